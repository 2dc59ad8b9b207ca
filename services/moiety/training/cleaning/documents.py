"""What all cleaners share: documents are texts, and the paragraphs of prose stand between empty lines."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

SHORTEST = 40  # characters of a paragraph of a manual; what is shorter is mostly a label
BETWEEN_PARAGRAPHS, BETWEEN_DOCUMENTS = "\n\n", "\f"  # a form feed: code has empty lines of its own
# Files of a permissive package that name another licence may be under it.
_RECIPROCAL = re.compile(
    r"GNU (Lesser |Library |Affero )?General Public|\b[AL]?GPL(v?[23])?\b|CC.BY.SA|Share-?Alike", re.I
)
# Of people, mostly: names of protocols at openssh.com, and of examples, stay.
_ADDRESS = re.compile(
    r"(?<![\w.+-])(?!git@)[\w.+-]+@(?!example\.|openssh\.|libssh\.)[\w-]+(?:\.[\w-]+)*"
    r"\.(?:com|org|net|edu|gov|info|io|dev|me|[a-z][a-z])\b(?!\.\w)"
)


def without_addresses(text: str) -> str:
    """Returns `text` with someone@example.org in place of addresses of e-mail."""
    return _ADDRESS.sub("someone@example.org", text)


def squeeze(text: str) -> str:
    """Returns `text` in one line: every run of white space is one space."""
    return " ".join(text.split())


def joined(paragraphs: Iterable[str]) -> str:
    """Returns paragraphs as one document."""
    return BETWEEN_PARAGRAPHS.join(paragraphs)


def read(file: Path) -> str:
    """Returns the text of a file with plain line ends. Bytes that are not UTF-8 become U+FFFD."""
    text = file.read_bytes().decode("utf-8", "replace").removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace(BETWEEN_DOCUMENTS, "")


def names_reciprocal_licence(text: str) -> bool:
    """Whether a text names a licence that asks the same of what is made from it, such as the GPL."""
    return _RECIPROCAL.search(text) is not None


def without_licence(text: str, about: re.Pattern[str], first: int = 0) -> str:
    """Returns code without the comments from line `first` on, if they are `about` its licence."""
    lines = text.split("\n")
    end = first
    while end < len(lines) and (lines[end].startswith("#") or not lines[end].strip()):
        end += 1
    if about.search("\n".join(lines[first:end])):
        lines[first:end] = []
    return "\n".join(line.rstrip() for line in lines).strip()


def unique(documents: Iterable[str]) -> Iterator[str]:
    """Yields documents, without those that came before with other white space."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256("".join(document.split()).encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def unique_paragraphs(documents: Iterable[str], seen: set[str]) -> Iterator[str]:
    """Yields documents without the paragraphs that are in `seen`, to which it adds theirs; headings may repeat."""
    for document in documents:
        kept = []
        for paragraph in document.split(BETWEEN_PARAGRAPHS):
            if len(paragraph) < SHORTEST or paragraph not in seen:
                kept.append(paragraph)
            seen.add(paragraph)
        while kept and len(kept[-1]) < SHORTEST:  # headings of paragraphs that were left out
            kept.pop()
        if kept:
            yield joined(kept)


def at_most(documents: Sequence[str], most: int | None) -> list[str]:
    """Returns documents of `most` characters at most, in their order.

    Which ones depends on the documents alone: those whose hashes are lowest, so that all parts of a manual have a chance.
    """
    if most is None:
        return list(documents)
    ranked = sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i].encode()).digest())
    chosen, size = [], 0
    for index in ranked:
        if size + len(documents[index]) <= most:
            chosen.append(index)
            size += len(documents[index])
    return [documents[index] for index in sorted(chosen)]
