"""Books in formats of their own: modules of the SWORD project, and databases of R packages."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from moiety.training.cleaning import bibles, r_data


def _string(text: str | None) -> bytes:
    encoded = b"" if text is None else text.encode()
    return struct.pack(">ii", 0x40009, -1 if text is None else len(encoded)) + encoded


def test_a_block_of_a_bible() -> None:
    """Marks of paragraphs become paragraphs, lines of poetry lines; notes, titles and numbers of verses are left out."""
    block = (
        '<div osisID="Mark" sID="g1" type="book"/><title type="main">Mark</title> <div sID="g2" type="x-p"/>'
        '<chapter n="1" osisID="Mark.1" sID="Mark.1"/><w lemma="strong:G1">The</w> beginning of the Good News'
        '<note placement="foot">a note</note> of Jesus. <div type="x-milestone" subType="x-preverse" sID="p"/>'
        'As it is written: <div eID="g2" type="x-p"/><lg sID="g3"/><l level="1" sID="g4"/>“Behold, I send my'
        ' messenger,<l eID="g4" level="1"/> <l level="2" sID="g5"/>who will prepare &amp; go”<l eID="g5" level="2"/>'
    )
    assert bibles.paragraphs(block) == [
        "The beginning of the Good News of Jesus. As it is written:",
        "“Behold, I send my messenger,\nwho will prepare & go”",
    ]


def test_the_blocks_of_a_module(tmp_path: Path) -> None:
    """Each block that has text is a document."""
    texts = [f"In the beginning there was text number {number}." for number in range(2)]
    blocks = [zlib.compress(text.encode()) for text in texts]
    rows = [(0, len(blocks[0]), len(texts[0])), (0, 0, 0), (len(blocks[0]), len(blocks[1]), len(texts[1]))]
    (tmp_path / "ot.bzs").write_bytes(b"".join(struct.pack("<III", *row) for row in rows))
    (tmp_path / "ot.bzz").write_bytes(b"".join(blocks))
    assert list(bibles.clean([tmp_path / "ot.bzz"])) == texts


def test_the_books_of_an_r_package(tmp_path: Path) -> None:
    """The longest vector of strings of a record is a book, and empty lines end its paragraphs; small ones are none."""
    lines = ["First line", "  second line ", "", *["é"] * 99]
    vector = struct.pack(">ii", 16, len(lines)) + b"".join(map(_string, lines))
    small = struct.pack(">ii", 16, 2) + _string("a") + _string(None)
    records = [b"X\n" + small + vector, b"X\n" + small]
    file = tmp_path / "Rdata.rdb"
    file.write_bytes(b"".join(struct.pack(">I", len(record)) + zlib.compress(record) for record in records))
    assert list(r_data.clean([file])) == ["First line second line\n\n" + " ".join(["é"] * 99)]


def test_another_compression_is_refused() -> None:
    """A record that zlib did not write gives an error that says where it is."""
    with pytest.raises(ValueError, match="at byte 0"):
        list(r_data.records(struct.pack(">I", 5) + b"BZh91"))
