"""Compiles the C++ sources of this folder into one shared library in a cache folder.

Users and image builds call this. Services never do: they find the library or compute with torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mfma"),
    # The compiler must not fuse operations: a row's bits are independent of its batch only if sums are computed as written.
    "-ffp-contract=off",
)
BUILD_S = 300.0  # timeout of each compiler command, in seconds
KEPT = 8  # libraries in a cache folder, of other versions or compilers too; one takes less than 1 MB


class BuildError(Exception):
    """The library cannot be built here. The message says why."""


def library_name() -> str:
    """Returns the library's file name, which changes with the sources, flags and platform."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((*FLAGS, platform.system(), platform.machine())).encode())
    return f"libmoiety-{digest.hexdigest()}.so"


def cache_folders() -> list[Path]:
    """Returns the folders for built libraries: `kernels` in $MOIETY_CACHE, if that is set, then in ~/.cache/moiety."""
    folders = [Path(text)] if (text := os.environ.get("MOIETY_CACHE")) else []
    with contextlib.suppress(RuntimeError):  # there may be no home folder
        folders.append(Path.home() / ".cache" / "moiety")
    return [folder / "kernels" for folder in folders]


def built() -> Path | None:
    """Returns the path of the library built from these sources; None if no cache folder has it."""
    name = library_name()
    return next((folder / name for folder in cache_folders() if (folder / name).is_file()), None)


def build() -> Path:
    """Compiles the library into the first cache folder, and writes the compiler's version to a .txt file beside it.

    Returns the library's path. If this compiler has already built these sources, nothing is compiled. Raises BuildError if
    the platform is not Linux on x86-64, there is no compiler or no writable cache folder, or a compilation fails.
    """
    compiler = _compiler()
    version = _output([compiler, "--version"])
    if not (folders := cache_folders()):
        raise BuildError("no cache folder: there is no home folder; set MOIETY_CACHE")
    library = folders[0] / library_name()
    stamp = library.with_suffix(".txt")
    if library.is_file() and stamp.is_file() and stamp.read_text() == version:
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
            fresh = Path(scratch, library.name)
            sources = sorted(FOLDER.glob("*.cpp"))
            objects = [Path(scratch, source.name).with_suffix(".o") for source in sources]
            commands = [
                [compiler, *FLAGS, "-c", str(source), "-o", str(to)]
                for source, to in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_output, commands))
            _output([compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(fresh)])
            os.replace(fresh, library)  # atomic: a starting replica sees the whole file or none
            stamp.write_text(version)
            with contextlib.suppress(OSError):  # another process may remove the same ones
                _prune(library.parent)
    except OSError as error:
        raise BuildError(f"cannot write to {library.parent}: {error}; set MOIETY_CACHE to another folder") from error
    return library


def _prune(folder: Path) -> None:
    """Removes all but the KEPT newest libraries. A process that has loaded one keeps it."""
    for library in sorted(folder.glob("libmoiety-*.so"), key=lambda file: file.stat().st_mtime, reverse=True)[KEPT:]:
        library.unlink(missing_ok=True)
        library.with_suffix(".txt").unlink(missing_ok=True)


def _compiler() -> str:
    """Returns the path of $CXX or, if that is not set, of the first of COMPILERS that is installed.

    Raises BuildError if none is installed, or if the platform is not Linux on x86-64.
    """
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise BuildError(f"the C++ kernels need Linux on x86-64: this is {platform.system()} {platform.machine()}")
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: none of {', '.join(names)} is on the PATH (Debian: apt-get install g++)")


def _output(command: list[str]) -> str:
    """Runs `command` and returns its standard output. Raises BuildError if the exit status is not 0."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
