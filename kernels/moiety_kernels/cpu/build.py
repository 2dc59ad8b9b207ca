"""Compiles the C++ sources of this folder into one shared library in the cache. Only users and images call it, never a
replica: one that starts finds the library or computes with torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mfma"),
    # Sums keep the order they are written in: it is what makes a row's bits independent of its batch.
    "-ffp-contract=off",
)
BUILD_S = 300.0


class BuildError(Exception):
    """The library cannot be built here; the message says what is missing."""


def library_name() -> str:
    """The library's file name: another one for every change of sources, flags or platform."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((*FLAGS, platform.system(), platform.machine())).encode())
    return f"libmoiety-{digest.hexdigest()}.so"


def cache_folders() -> list[Path]:
    """Where a built library may lie, first choice first: $MOIETY_CACHE, ~/.cache/moiety."""
    folders = [Path(text)] if (text := os.environ.get("MOIETY_CACHE")) else []
    try:
        folders.append(Path.home() / ".cache" / "moiety")
    except RuntimeError:  # no home
        pass
    return [folder / "kernels" for folder in folders]


def built() -> Path | None:
    """The library of these sources, where someone has built it."""
    name = library_name()
    return next((folder / name for folder in cache_folders() if (folder / name).is_file()), None)


def build() -> Path:
    """Compiles into the first cache folder: `<library>`, and beside it the compiler's version as `<library>.txt`.

    Returns at once where this compiler has built these sources already. Raises BuildError.
    """
    compiler = _compiler()
    version = _output([compiler, "--version"])
    if not (folders := cache_folders()):
        raise BuildError("there is no home folder: set MOIETY_CACHE")
    library = folders[0] / library_name()
    stamp = library.with_suffix(".txt")
    if library.is_file() and stamp.is_file() and stamp.read_text() == version:
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
            fresh = Path(scratch, library.name)
            _output([compiler, *FLAGS, *map(str, sorted(FOLDER.glob("*.cpp"))), "-o", str(fresh)])
            os.replace(fresh, library)  # a replica that starts meanwhile sees the whole file or none
            stamp.write_text(version)
    except OSError as error:
        raise BuildError(f"{library.parent} cannot be written: {error}") from error
    return library


def _compiler() -> str:
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        raise BuildError(f"the C++ kernels are for Linux on x86-64: this is {platform.system()} {platform.machine()}")
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler: none of {', '.join(names)} is on the PATH (Debian: apt-get install g++)")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
