"""Brings archives from package registries with the registries' own clients: pip, apt-get and npm. No code of a package runs."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moiety.errors import Unavailable
from moiety.training.sources.source import Archive

_APT_HELPER = "/usr/lib/apt/apt-helper"  # apt's own downloader, in every Debian
_SAID = 500  # characters of what a client said, for an error
_TARGETS = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
_REMEDY = (
    "Debian keeps the newest version of a package only. Get this file from snapshot.debian.org, put it into the folder"
    " archives, and run the command again"
)


def download(archive: Archive, folder: Path) -> Path:
    """Brings the file of `archive` into `folder` and returns it. Its contents are not checked here.

    Raises Unavailable if the registry's client is missing, or does not bring the file; the error ends with what it said.
    """
    with tempfile.TemporaryDirectory(dir=folder) as new:
        {"pypi": _pypi, "debian": _debian, "debian source": _debian_source, "npm": _npm}[archive.registry](
            archive, Path(new)
        )
        files = [file for file in Path(new).iterdir() if file.is_file()]
        if len(files) != 1:
            raise Unavailable(f"{archive.title}: expected one file, but got {[file.name for file in files]}")
        return files[0].replace(folder / archive.file)


def _run(archive: Archive, *command: str, folder: Path) -> str:
    """Runs a client in `folder` and returns what it printed."""
    if shutil.which(command[0]) is None:
        raise Unavailable(
            f"{archive.title}: needs the program {command[0]}, which is not installed, or the file {archive.file} in the"
            " folder archives"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        remedy = f". {_REMEDY}" if archive.registry.startswith("debian") else ""
        said = " ".join(done.stderr.split())[-_SAID:]
        raise Unavailable(f"{archive.title} cannot be fetched: {' '.join(command[:3])} said: {said}{remedy}")
    return done.stdout


def _pypi(archive: Archive, folder: Path) -> None:
    if not archive.file.endswith(".whl"):
        _pypi_source(archive, folder)
        return
    wanted = f"{archive.package}=={archive.version}"
    # A wheel without compiled code. It is read, not installed: which Python it is for does not matter, but pip asks.
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--platform=any", f"--python-version={archive.python}"]
    _run(archive, sys.executable, "-m", "pip", "download", *options, "--dest=.", wanted, folder=folder)


def _pypi_source(archive: Archive, folder: Path) -> None:
    """Brings a source archive. `pip download` would run its build for metadata, so pip is only asked where it is."""
    try:
        create_command: Any = importlib.import_module("pip._internal.commands").create_command
    except ImportError as error:
        raise Unavailable(f"{archive.title}: needs pip in this Python's environment") from error
    command = create_command("download")
    options, _ = command.parse_args([f"--no-binary={archive.package}"])
    with command.main_context():
        http = command.get_default_session(options)
        finder = command._build_package_finder(options, http)  # noqa: SLF001 (pip has no public name for it)
        for candidate in finder.find_all_candidates(archive.package):
            if candidate.link.filename == archive.file:
                answer = http.get(candidate.link.url_without_fragment, headers={"Accept-Encoding": "identity"})
                answer.raise_for_status()
                (folder / archive.file).write_bytes(answer.content)
                return
    raise Unavailable(f"{archive.title} cannot be fetched: the index of packages does not list {archive.file}")


def _npm(archive: Archive, folder: Path) -> None:
    wanted = f"{archive.package}@{archive.version}"
    _run(archive, "npm", "pack", "--ignore-scripts", "--silent", wanted, folder=folder)


def _debian(archive: Archive, folder: Path) -> None:
    _run(archive, "apt-get", "-qq", "download", f"{archive.package}={archive.version}", folder=folder)


def _debian_source(archive: Archive, folder: Path) -> None:
    """Brings one file of a source package, from the mirrors that this machine has its Debian packages from.

    A list of sources of its own asks them for source packages: many machines ask for binary ones only.
    """
    targets = _run(archive, "apt-get", "indextargets", "--format", _TARGETS, "Created-By: Packages", folder=folder)
    mirrors = {line.split("|", 1)[1] for line in targets.splitlines() if line.startswith("Debian|")}
    state = folder.parent / "apt"  # stays, so that the lists are fetched once
    (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    lines = [f"deb-src {' '.join(mirror.split('|'))}\n" for mirror in sorted(mirrors)]
    (state / "sources.list").write_text("".join(lines), encoding="utf-8")
    settings = {
        "Dir::Etc::SourceList": f"{state.absolute()}/sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": f"{state.absolute()}/lists",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Sandbox::User": "root",  # the folder may be closed to apt's own user
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    _run(archive, "apt-get", "-qq", *options, "update", folder=folder)
    command = ("apt-get", "-qq", *options, "source", "--print-uris", "--only-source", archive.package)
    found = _run(archive, *command, folder=folder)
    for address, name, sha256 in re.findall(r"^'(\S+)' (\S+) \d+ (SHA256:\S+)", found, re.M):
        if name == archive.file:
            _run(archive, _APT_HELPER, *options, "-q", "download-file", address, name, sha256, folder=folder)
            return
    raise Unavailable(f"{archive.title} cannot be fetched: {archive.file} is not in this Debian. {_REMEDY}")
