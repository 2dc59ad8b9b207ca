"""The code blocks of the repository's Markdown files, and what their markers say about running them.

A marker is an HTML comment on the line before a block, so readers do not see it:

    <!-- run -->                   the block runs to its end
    <!-- run until "TEXT" -->      its last command goes on while the blocks behind it run; TEXT is printed once it is ready
    <!-- run beside -->            needs a running system: that of the `until` block above it, or that of the test session
    <!-- run beside slow -->       runs beside the `until` block only
    <!-- run slow -->              as `run`, but not in the fast suite

A block without a marker must parse.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r'<!-- run( beside)?( slow)?(?: until "([^"]+)")? -->')
FENCE = re.compile(r"( *)```(\w*)$")
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Marker:
    """What a marker says; see this module's docstring."""

    beside: bool = False
    slow: bool = False
    until: str = ""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the file and line where it begins, its language, its text, and its marker, if it has one."""

    file: str
    line: int
    language: str
    text: str
    marker: Marker | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def script(self) -> str:
        """What a reader pastes: of a console block the lines behind `$ `, with their continuations; else all of it."""
        if self.language != "console":
            return self.text
        lines, goes_on = [], False
        for line in self.text.splitlines():
            if goes_on or line.startswith("$ "):
                lines.append(line if goes_on else line.removeprefix("$ "))
                goes_on = line.endswith("\\")
        return "".join(f"{line}\n" for line in lines)


def pages() -> list[str]:
    """Returns the tracked Markdown files but the changelog, which names commands that are gone."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split() if path != "CHANGELOG.md"]


def blocks(file: str, text: str) -> list[Block]:
    """Returns the fenced blocks of `text`, which is that of `file`. Raises ValueError for a marker that marks nothing."""
    found: list[Block] = []
    marker: Marker | None = None
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        if fence := FENCE.fullmatch(line):
            indent, language = fence[1], fence[2]
            body = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                body.append(inner.removeprefix(indent))
            found.append(Block(file, number, language, "".join(f"{each}\n" for each in body), marker))
            marker = None
        elif marker is not None:
            raise ValueError(f"{file}:{number}: the marker before this line is not directly before a block")
        elif line.strip().startswith("<!-- run"):
            if (match := MARKER.fullmatch(line.strip())) is None:
                raise ValueError(f"{file}:{number}: {line.strip()}: not a marker; see {Path(__file__).name}")
            marker = Marker(bool(match[1]), bool(match[2] or match[3]), match[3] or "")
    return found


def spans(text: str) -> Iterator[str]:
    """Yields the code spans of `text` outside its fenced blocks, each on one line."""
    outside = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for match in SPAN.finditer(outside):
        yield " ".join(match[1].split())


def all_blocks() -> list[Block]:
    """Returns the blocks of every page."""
    return [block for page in pages() for block in blocks(page, (ROOT / page).read_text("utf-8"))]
