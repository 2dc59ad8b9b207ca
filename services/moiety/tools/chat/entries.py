"""What the user enters: messages and commands, line by line or over several lines, with line editing in a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moiety.tools.chat.screen import CONTINUED, PROMPT, Screen

QUOTES = '"""'
HISTORY_LINES = 1000
ReadLine = Callable[[str], str]  # prompt -> line; raises EOFError


def entries(screen: Screen) -> Iterator[str]:
    """Yields what the user enters until the end of input. Ctrl-C drops what is being entered; empty entries are left out."""
    read = _edited(screen) if screen.interactive else _piped
    while True:
        try:
            entry = _entry(read)
        except KeyboardInterrupt:
            screen.reply("\n")
            screen.note("Ctrl-D or /quit leaves.")
        except EOFError:
            screen.reply("\n" if screen.interactive else "")
            return
        else:
            if entry.strip():
                yield entry


def _entry(read: ReadLine) -> str:
    """Reads one entry: a line, lines that end with a backslash and the next one, or lines between triple quotes."""
    line = read(PROMPT)
    if line.startswith(QUOTES):
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(_or_end(read, QUOTES))
        return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix(QUOTES)]).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        lines.append(_or_end(read, ""))
    return "\n".join(lines)


def _or_end(read: ReadLine, at_end: str) -> str:
    """Returns the next line of an entry; `at_end` where the input ends, so that what came before is not lost."""
    try:
        return read(CONTINUED)
    except EOFError:
        return at_end


def _edited(screen: Screen) -> ReadLine:
    return lambda prompt: input(screen.prompt(prompt))


def _piped(_prompt: str) -> str:
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.removesuffix("\n")


class LineEditor:
    """Line editing by readline, where Python has it: history, which lasts in `file` unless that is None, and completion."""

    def __init__(self, file: Path | None, words: Sequence[str]):
        try:
            import readline
        except ImportError:  # some builds of Python lack it: lines can be entered, but not edited
            self._readline: Any = None
        else:
            self._readline = readline
        self._file, self._words = file, words
        self._kept = 0  # entries that the file has

    def __enter__(self) -> LineEditor:
        if self._readline is None:
            return self
        with suppress(OSError):
            if self._file is not None:
                self._readline.read_history_file(self._file)
        self._readline.set_history_length(HISTORY_LINES)
        self._kept = self._readline.get_current_history_length()
        self._readline.set_completer_delims("")
        self._readline.set_completer(self._complete)
        is_libedit = "libedit" in (self._readline.__doc__ or "")
        self._readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        return self

    def __exit__(self, *_: object) -> None:
        """Adds this chat's entries to the file, which only its owner may read."""
        if self._readline is None or self._file is None:
            return
        new = self._readline.get_current_history_length() - self._kept
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._file, os.O_CREAT | os.O_WRONLY, 0o600))
            self._readline.append_history_file(new, self._file)

    def _complete(self, text: str, state: int) -> str | None:
        found = [word for word in self._words if text and word.startswith(text)]
        return found[state] if state < len(found) else None


def history_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the file of the chat's history, in the folder where XDG keeps state."""
    folder = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(folder, "moiety", "chat_history")
