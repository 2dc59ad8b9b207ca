"""Translated messages of programs → their sentences. Labels, and messages with placeholders or code, are left out."""

from __future__ import annotations

import ast
import html
import json
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moiety.training.cleaning.documents import SHORTEST, joined, read, squeeze

_TAG = re.compile(r"<[^<>\n]{1,200}>")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_CODE = re.compile(r"```.*?```", re.S)
_MARKER = re.compile(r"^\s*(#+|[-*•]|\d+[.)])\s*")
_END = re.compile(r"[.!?:…][\"”“»)]?$")
_NO_PROSE = re.compile(r"https?:|[{}<>|]|%\d?\$?[sdi]|%\(|\[%|==|\$\(|&&|\b_\w+_\b|\ufffd")
_LETTERS = 0.88  # share of letters and spaces
_FEWEST_SPACES = 6
_PO_ENTRY = re.compile(r'^msgstr(?:\[\d+\])?\s+((?:"(?:[^"\\]|\\.)*"\s*)+)', re.M)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_MO_MAGIC = 0x950412DE


def sentences(message: str) -> Iterator[str]:
    """Yields the lines of a message that are sentences."""
    text = _CODE.sub("", _LINK.sub(r"\1", _TAG.sub("", html.unescape(message))))
    for line in re.split(
        r"\\n|\\r|\n", text.replace("\u200b", "").replace("`", "").replace("**", "").replace("__", "")
    ):
        line = squeeze(_MARKER.sub("", line))
        prose = sum(letter.isalpha() or letter == " " for letter in line) >= _LETTERS * len(line)
        whole = len(line) >= SHORTEST and line.count(" ") >= _FEWEST_SPACES and _END.search(line)
        if whole and prose and not _NO_PROSE.search(line):
            yield line


def _strings(value: Any) -> Iterator[str]:
    """Yields the strings of a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _po_messages(text: str) -> Iterator[str]:
    """Yields the translations of a gettext source, without those that are marked as fuzzy or obsolete."""
    for entry in re.split(r"\n\s*\n", text):
        if not re.search(r"^#(~|,.*fuzzy)", entry, re.M) and not re.search(r'^msgid ""\n(?!")', entry, re.M):
            for match in _PO_ENTRY.finditer(entry):
                yield "".join(ast.literal_eval(part) for part in _STRING.findall(match[1]))


def _mo_messages(content: bytes) -> Iterator[str]:
    """Yields the translations of a compiled gettext file. Raises ValueError for other files.

    Its header holds uint32: magic, revision, count, and where the tables of originals and of translations are; a row of a
    table is a size and a place. Source: the manual of gettext, "The Format of GNU MO Files".
    """
    order = "<" if content[:4] == struct.pack("<I", _MO_MAGIC) else ">"
    magic, _, count, _, table = struct.unpack_from(f"{order}5I", content)
    if magic != _MO_MAGIC:
        raise ValueError("no compiled gettext file")
    for row in range(1, count):  # the first one is about the file
        size, place = struct.unpack_from(f"{order}2I", content, table + 8 * row)
        yield from content[place : place + size].decode("utf-8", "replace").split("\0")


def messages(file: Path) -> Iterator[str]:
    """Yields the messages of a file: JSON, an array in JavaScript, gettext (.po, .mo). Raises ValueError for other files."""
    match file.suffix:
        case ".json":
            yield from _strings(json.loads(read(file)))
        case ".js":  # an array of strings, one a line
            yield from (json.loads(part) for part in _STRING.findall(read(file)))
        case ".po":
            yield from _po_messages(read(file))
        case ".mo":
            yield from _mo_messages(file.read_bytes())
        case other:
            raise ValueError(f"{file.name}: {other} is no kind of translations; .json, .js, .po and .mo are")


def clean(files: Sequence[Path]) -> Iterator[str]:
    """Yields the sentences of each file, each of them once."""
    seen: set[str] = set()
    for file in files:
        found = []
        for line in (line for message in messages(file) for line in sentences(message)):
            if line not in seen:
                found.append(line)
            seen.add(line)
        if found:
            yield joined(found)
