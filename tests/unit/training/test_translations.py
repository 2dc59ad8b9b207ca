"""Translated messages of programs, in the kinds of files that hold them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from moiety.training.cleaning import translations

ONE = "Dieser Satz steht in den Meldungen eines Programms."
TWO = "Auch dieser Satz steht in den Meldungen eines Programms."


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        (f"<b>{ONE}</b>\n- **{TWO}**", [ONE, TWO]),
        ("Speichern", []),
        ("Dieser Satz hat einen Platzhalter, und zwar {name} im Text.", []),
        ("Dieser Satz mit vielen Worten hat kein Zeichen am Ende", []),
        ("Mehr dazu steht [in diesem Handbuch](https://example.org), das Sie lesen können.", None),
    ],
)
def test_sentences(message: str, kept: list[str] | None) -> None:
    """Whole sentences stay, without their marks; labels and placeholders do not."""
    expected = ["Mehr dazu steht in diesem Handbuch, das Sie lesen können."] if kept is None else kept
    assert list(translations.sentences(message)) == expected


def test_json_messages(tmp_path: Path) -> None:
    """Strings at any depth count, and a repeated sentence once, over all files."""
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps({"a": {"b": [ONE, "x"]}, "c": 1}))
    second.write_text(json.dumps([ONE, TWO]))
    assert list(translations.clean([first, second])) == [ONE, TWO]


def test_an_array_in_javascript(tmp_path: Path) -> None:
    """Its strings are messages, with their escapes."""
    file = tmp_path / "a.json.js"
    file.write_text(
        f'var content = [\n\tundefined,\n\t"{ONE}",\n\t"\\u0044er Satz beginnt mit einem Zeichen in Hexadezimal."\n];'
    )
    assert list(translations.clean([file])) == [f"{ONE}\n\nDer Satz beginnt mit einem Zeichen in Hexadezimal."]


def test_po_messages(tmp_path: Path) -> None:
    """Continued strings are one message; fuzzy and obsolete ones are left out."""
    file = tmp_path / "a.po"
    half = len(ONE) // 2
    file.write_text(
        'msgid ""\nmsgstr ""\n"Content-Type: text/plain, which is no sentence of the program at all.\\n"\n\n'
        f'#: x.py\nmsgid "One"\nmsgstr ""\n"{ONE[:half]}"\n"{ONE[half:]}"\n\n'
        f'#, fuzzy\nmsgid "Two"\nmsgstr "{TWO}"\n\n#~ msgid "Three"\n#~ msgstr "{TWO}"\n'
    )
    assert list(translations.clean([file])) == [ONE]


def test_mo_messages(tmp_path: Path) -> None:
    """The compiled translations are found by their table; plural forms are messages of their own."""
    texts = [b"about the file", f"{ONE}\0{TWO}".encode()]
    table, place = b"", 28 + 16
    for text in texts:
        table += struct.pack("<2I", len(text), place)
        place += len(text)
    file = tmp_path / "a.mo"
    file.write_bytes(struct.pack("<7I", 0x950412DE, 0, 2, 28, 28, 0, 0) + table + b"".join(texts))
    assert list(translations.clean([file])) == [f"{ONE}\n\n{TWO}"]


def test_other_files(tmp_path: Path) -> None:
    """A file of another kind gives an error that lists the known ones."""
    with pytest.raises(ValueError, match=r"a\.ts: \.ts .*\.json, \.js, \.po and \.mo"):
        list(translations.messages(tmp_path / "a.ts"))
