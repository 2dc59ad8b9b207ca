"""The registries' clients: programs of the same names stand in for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moiety.errors import Unavailable
from moiety.training.download import download
from moiety.training.sources.source import Archive

NPM = Archive("npm", "@someone/thing", "1.0.0", "thing.tgz", "0" * 64)
DEBIAN = Archive("debian", "thing", "1.0-1", "thing.deb", "0" * 64)
SOURCE = Archive("debian source", "thing", "1.0", "thing_1.0.orig.tar.xz", "0" * 64)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is searched for programs before any other."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """The folder for what is fetched."""
    folder = tmp_path / "archives"
    folder.mkdir()
    return folder


def _program(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_a_package_is_fetched_without_its_scripts(programs: Path, archives: Path) -> None:
    """The client is asked for that version, and told to run nothing; the file gets the name that the table has."""
    _program(programs, "npm", 'echo "$@" > someone-thing-1.0.0.tgz')
    file = download(NPM, archives)
    assert file == archives / "thing.tgz"
    assert file.read_text() == "pack --ignore-scripts --silent @someone/thing@1.0.0\n"
    assert list(archives.iterdir()) == [file]


def test_a_version_that_debian_has_no_more(programs: Path, archives: Path) -> None:
    """The error says what apt-get said, and where old versions are."""
    _program(programs, "apt-get", 'echo "E: Version 1.0-1 for thing was not found" >&2; exit 100')
    with pytest.raises(Unavailable, match=r"thing 1\.0-1 \(Debian\) .*was not found.*snapshot\.debian\.org"):
        download(DEBIAN, archives)
    assert not list(archives.iterdir())


def test_a_source_archive_that_debian_has_no_more(programs: Path, archives: Path) -> None:
    """Debian's mirrors, and no others, are asked for source packages; the error names the file they lack."""
    _program(
        programs,
        "apt-get",
        """case "$*" in
        *indextargets*) printf 'Debian|http://mirror.example/|bookworm|main\\nOther|http://other.example/|x|y\\n' ;;
        *source*) echo "'http://mirror.example/thing_2.0.orig.tar.xz' thing_2.0.orig.tar.xz 10 SHA256:00" ;;
        esac""",
    )
    with pytest.raises(Unavailable, match=r"thing_1\.0\.orig\.tar\.xz is not in this Debian.*snapshot\.debian\.org"):
        download(SOURCE, archives)
    assert (archives / "apt" / "sources.list").read_text() == "deb-src http://mirror.example/ bookworm main\n"


def test_a_client_that_is_missing(programs: Path, archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the program that is not installed."""
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(Unavailable, match="the program npm"):
        download(NPM, archives)
