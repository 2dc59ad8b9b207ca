"""Bibles and commentaries in the compressed files of the SWORD project → books and chapters as prose, without verse numbers.

A module has parts (ot, nt) of three files each. `.?zz` holds deflated blocks. `.?zs` holds uint32[blocks, 3]: where a
block starts there, its size, and its size inflated. `.?zv` holds a row for each verse: uint32 block, uint32 start, and a
size that is uint16, or uint32 in modules of the drivers zText4 and zCom4. A block is a book or a chapter in OSIS, an XML.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from moiety.training.cleaning.documents import joined, squeeze

_LEFT_OUT = re.compile(r"<(note|title|table|figure)\b[^>]*?(?<!/)>.*?</\1>", re.S)
_PARAGRAPH = re.compile(r'<(?:div|lg)\b[^>]*(?:sID|type="x-p")[^>]*>|</?(?:p|lg|div)>|<chapter\b[^>]*>')
_LINE = re.compile(r"<l\b[^>]*sID[^>]*>|<lb\b[^>]*>|</l>")
_TAG = re.compile(r"<[^>]+>")
_INSIDE = "x-preverse"  # marks that stand inside paragraphs
_SHORTEST = 30  # characters
_OLD_SPANISH = re.compile(r"\b([ÁÉÓÚáéóú]|[Ff]ué|[Ff]uí|[Dd]ió|[Vv]ió|[Vv]í)\b")
_WITHOUT_ACCENTS = str.maketrans("ÁÉÍÓÚáéíóú", "AEIOUaeiou")


def paragraphs(block: str) -> list[str]:
    """Returns the paragraphs of a block; lines of poetry stay lines."""
    block = re.sub(rf"<div\b[^>]*{_INSIDE}[^>]*>", "", _LEFT_OUT.sub("", block))
    block = re.sub(r"\s+", " ", block)
    block = _TAG.sub("", _LINE.sub("\n", _PARAGRAPH.sub("\f", block)))
    found = []
    for paragraph in html.unescape(block).replace("¶", "").split("\f"):
        lines = [line for line in map(squeeze, paragraph.split("\n")) if line]
        if sum(map(len, lines)) >= _SHORTEST:
            found.append("\n".join(lines))
    return found


def clean(files: Sequence[Path]) -> Iterator[str]:
    """Yields each block that has text. `files` are the deflated ones, `.bzz` or `.czz`; their indices lie beside them."""
    for file in files:
        index, deflated = file.with_suffix(file.suffix[:2] + "zs").read_bytes(), file.read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index[: len(index) // 12 * 12]):
            if size and (
                found := paragraphs(zlib.decompress(deflated[start : start + size]).decode("utf-8", "replace"))
            ):
                yield joined(found)


def clean_spanish(files: Sequence[Path]) -> Iterator[str]:
    """Yields each block with the accents of today's Spanish on the words that differ most often: á, é, ó, ú, fué, vió."""
    for document in clean(files):
        yield _OLD_SPANISH.sub(lambda match: match[0].translate(_WITHOUT_ACCENTS), document)
