"""HTML pages of manuals → their prose: no code, no navigation, no signatures of functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from moiety.training.cleaning.documents import SHORTEST, joined, read, squeeze

_BLOCK_TAGS = """
    address article aside blockquote body br caption dd div dl dt fieldset figure footer form h1 h2 h3 h4 h5 h6 header hr
    html li main ol p section summary table tbody td th thead tr ul
"""
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_LEFT_OUT = frozenset({"head", "nav", "pre", "script", "select", "style", "svg", "template", "textarea"})
_CLASSES = """
    sphinxsidebar related footer headerlink sig contents toc toctree-wrapper navheader navfooter highlight viewcode-link
    literallayout programlisting screen synopsis refsynopsisdiv langavail toplang bottomlang
    related-topics     indextable modindextable genindextable
"""
_LEFT_OUT_CLASSES = frozenset(_CLASSES.split())
_LEFT_OUT_IDS = frozenset({"preamble", "quickview", "comments_section", "footer", "path", "toc"})
_CHARSET = re.compile(rb"charset=[\"']?(iso-8859-1|windows-1252)", re.I)


class _Prose(HTMLParser):
    """Collects the paragraphs of a page. A heading is kept where a paragraph follows it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._heading = ""
        self._in_heading = False
        self._left_out = ""  # the tag of the element that is being left out
        self._depth = 0  # of that tag inside that element

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._left_out:
            self._depth += tag == self._left_out
            return
        if tag in _BLOCKS:
            self.end_block()
        values = dict(attrs)
        classes = (values.get("class") or "").split()
        if tag in _LEFT_OUT or not _LEFT_OUT_CLASSES.isdisjoint(classes) or values.get("id") in _LEFT_OUT_IDS:
            self._left_out, self._depth = tag, 1
        self._in_heading = tag in _HEADINGS or (self._in_heading and tag not in _BLOCKS)

    def handle_endtag(self, tag: str) -> None:
        if self._left_out:
            self._depth -= tag == self._left_out
            if not self._depth:
                self._left_out = ""
        elif tag in _BLOCKS:
            self.end_block()
            self._in_heading = False

    def handle_data(self, data: str) -> None:
        if not self._left_out:
            self._text.append(data)

    def end_block(self) -> None:
        """Ends a paragraph or heading, where one has begun."""
        text = squeeze("".join(self._text).replace("¶", ""))
        self._text.clear()
        if self._in_heading:
            self._heading = text or self._heading
        elif len(text) >= SHORTEST and " " in text:
            self.paragraphs += [self._heading, text] if self._heading else [text]
            self._heading = ""


def paragraphs(page: str) -> list[str]:
    """Returns the paragraphs of a page or of a part of one, in their order."""
    parser = _Prose()
    parser.feed(page)
    parser.close()
    parser.end_block()
    return parser.paragraphs


def clean(files: Sequence[Path]) -> Iterator[str]:
    """Yields the prose of each page that has any."""
    for file in files:
        raw = file.read_bytes()
        page = raw.decode("cp1252" if _CHARSET.search(raw[:1500]) else "utf-8", "replace")
        if found := paragraphs(page):
            yield joined(found)


def clean_templates(files: Sequence[Path]) -> Iterator[str]:
    """Yields the prose of files whose pages stand in script elements, as templates of a program."""
    for file in files:
        if found := paragraphs(re.sub(r"</?script\b[^>]*>", "", read(file))):
            yield joined(found)
