"""Markdown → prose, or the whole text where its commands are what is wanted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from moiety.training.cleaning.documents import SHORTEST, joined, names_reciprocal_licence, read, squeeze

_HEADER = re.compile(r"\A---\n.*?\n---\n", re.S)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_FENCED = re.compile(r"^ *(```+|~~~+)[^`\n]*\n.*?^ *\1", re.S | re.M)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HTML = re.compile(r"</?(?:a|b|br|code|div|em|h\d|i|img|li|ol|p|span|strong|t(?:able|body|d|h|head|r)|ul)\b[^<>]*>")
_TABLE_ROW = re.compile(r"^\s*\|.*\n", re.M)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])")
_ADMONITION = re.compile(r"^ *(/{3}|!{3}|\?{3}|:{3}).*$", re.M)
_BLOCK = re.compile(r"\n\s*\n|\n(?=\s*(?:[*+-] |\d+\. ))")
_HEADING = re.compile(r"^ *(#+ .*)$", re.M)
_MARKER = re.compile(r"^(?:[#>*+-]+\s+|\d+\. )+")
_ATTRIBUTES = re.compile(r"\s*\{ ?[.#:][^}]*\}")
_MARKS = re.compile(r"`|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)|(?<!\w)_(?=\w)|(?<=\w)_(?!\w)|&nbsp;")


def paragraphs(text: str) -> list[str]:
    """Returns the paragraphs and list items of a Markdown text, and the headings that they follow.

    Code, tables, and the targets of links are left out.
    """
    text = _FENCED.sub("", _COMMENT.sub("", _HEADER.sub("", text)))
    text = _LINK.sub(r"\1", _IMAGE.sub("", _TAG.sub("", text)))
    text = _HEADING.sub(r"\n\n\1\n\n", _ADMONITION.sub("\n", text))
    found: list[str] = []
    heading = ""
    for block in map(str.strip, _BLOCK.split(text)):
        plain = squeeze(_MARKS.sub("", _MARKS.sub("", _ATTRIBUTES.sub("", _MARKER.sub("", block)))))  # _**both**_
        if block.startswith("#"):
            heading = plain
        elif len(plain) >= SHORTEST and "|" not in plain and "{!" not in plain:
            found += [heading, plain] if heading else [plain]
            heading = ""
    return found


def clean(files: Sequence[Path]) -> Iterator[str]:
    """Yields the prose of each file that has any."""
    for file in files:
        if found := paragraphs(read(file)):
            yield joined(found)


def clean_whole(files: Sequence[Path]) -> Iterator[str]:
    """Yields each file with its code, without header, comments and tables; not those that name a reciprocal licence."""
    for file in files:
        text = read(file)
        if not names_reciprocal_licence(text):
            text = _TABLE_ROW.sub("", _HTML.sub("", _COMMENT.sub("", _HEADER.sub("", text))))
            yield re.sub(r"\n\s*\n\s*\n", "\n\n", _LINK.sub(r"\1", text)).strip()
