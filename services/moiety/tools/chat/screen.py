"""Where a chat prints: plain text through a pipe; styles, notes and a prompt on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from moiety.core.text import for_terminal

PROMPT, CONTINUED = "> ", ". "
DIM, RED, BOLD, PLAIN = "\033[2m", "\033[31m", "\033[1m", "\033[0m"


class Screen:
    """Prints replies on stdout, and errors on stderr if stdout is not a terminal.

    `interactive`: a person reads and writes. `styled`: reasoning is dim, unless NO_COLOR or a dumb terminal forbids styles.
    """

    def __init__(self, out: TextIO, err: TextIO, *, interactive: bool, styled: bool):
        self.interactive, self.styled = interactive, styled
        self._out, self._err = out, err
        self._in_line = False  # whether the last line has text
        self._style = ""

    @classmethod
    def standard(cls, environment: Mapping[str, str] = os.environ) -> Screen:
        """Returns the screen of this process's standard streams."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        plain = bool(environment.get("NO_COLOR")) or environment.get("TERM") == "dumb"
        return cls(sys.stdout, sys.stderr, interactive=interactive, styled=interactive and not plain)

    def reply(self, text: str, *, style: str = "") -> None:
        """Prints a piece of a reply at once."""
        text = self._safe(self._out, text)
        if style != self._style and self.styled:
            self._out.write((PLAIN if self._style else "") + style)
            self._style = style
        self._out.write(text)
        self._out.flush()
        if text:
            self._in_line = not text.endswith("\n")

    def end_reply(self) -> None:
        """Ends the reply's style, and its line if that has text."""
        self.reply("\n" if self._in_line else "")

    def note(self, text: str) -> None:
        """Prints a note for a person; prints nothing through a pipe."""
        if self.interactive:
            self.end_reply()
            self._line(self._out, text, DIM)

    def answer(self, text: str) -> None:
        """Prints what a command was asked for."""
        self.end_reply()
        self._line(self._out, text, DIM)

    def error(self, text: str) -> None:
        """Prints an error as one line."""
        self.end_reply()
        self._line(self._out if self.interactive else self._err, f"error: {' '.join(text.split())}", RED)

    def prompt(self, text: str) -> str:
        """Returns a prompt for readline, which must know which characters take no room."""
        return f"\001{BOLD}\002{text}\001{PLAIN}\002" if self.styled else text

    def _line(self, stream: TextIO, text: str, style: str) -> None:
        text = self._safe(stream, text)
        stream.write(f"{style}{text}{PLAIN}\n" if self.styled else f"{text}\n")
        stream.flush()

    def _safe(self, stream: TextIO, text: str) -> str:
        """Returns `text` as it may go to `stream`: a terminal shows it also where what is entered comes through a pipe."""
        return for_terminal(text) if self.interactive or stream.isatty() else text
