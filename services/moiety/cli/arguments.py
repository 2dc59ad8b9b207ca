"""Option types and how they refuse, for every command: they need nothing that a plain `pip install moiety` lacks."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias

import click

from moiety.core import address
from moiety.core.text import not_utf8

Param: TypeAlias = click.Parameter | None
Ctx: TypeAlias = click.Context | None


class FiniteRange(click.FloatRange):
    """Option type: a number within bounds. Unlike click's, no bound lets NaN or infinity pass."""

    def convert(self, value: Any, param: Param, ctx: Ctx) -> float:
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Address(click.ParamType[str]):
    """Option type: HOST:PORT, with an IPv6 address in brackets."""

    name = "address"

    def convert(self, value: Any, param: Param, ctx: Ctx) -> str:
        try:
            return address.joined(*address.split(str(value)))
        except ValueError as error:
            why = "leave out http:// and what follows the port" if "://" in str(value) else str(error)
            shown = str(value).rpartition("@")[2]  # what stands before it may be a password
            self.fail(f"{shown!r}: {why}; must be {address.FORM}", param, ctx)


class Text(click.ParamType[str]):
    """Option type: text in UTF-8, whatever the locale of this process says."""

    name = "text"

    def convert(self, value: Any, param: Param, ctx: Ctx) -> str:
        text = str(value)
        with suppress(UnicodeEncodeError):
            text = os.fsencode(text).decode("utf-8", "surrogateescape")
        if (why := not_utf8(text)) is not None:
            self.fail(f"{text!r}: {why}", param, ctx)
        return text


class TextFile(click.Path):
    """Option type: the text of a file in UTF-8; `-` is stdin."""

    name = "file"

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, readable=True, allow_dash=True)

    def convert(self, value: Any, param: Param, ctx: Ctx) -> str:
        file = os.fsdecode(super().convert(value, param, ctx))
        try:
            data: bytes = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            return data.decode("utf-8")
        except OSError as error:
            self.fail(f"{file}: {error.strerror}", param, ctx)
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self.fail(f"{file}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8", param, ctx)


class OutputFile(click.Path):
    """Option type: a file to write at the end of the work. Refused before the work if its folder cannot take it.

    `endings`: those that its name may have; any, if there are none.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self._endings = endings

    def convert(self, value: Any, param: Param, ctx: Ctx) -> Path:
        file = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not file.parent.is_dir():
            self.fail(f"{file.parent} is not a folder", param, ctx)
        if not file.exists() and not os.access(file.parent, os.W_OK):
            self.fail(f"{file.parent} cannot be written to", param, ctx)
        if self._endings and file.suffix not in self._endings:
            self.fail(f"{file.name!r}: must end in one of {', '.join(self._endings)}", param, ctx)
        return file


class PictureFile(OutputFile):
    """Option type: a picture to draw at the end of the work. Raises ModuleNotFoundError where nothing can draw it."""

    def __init__(self) -> None:
        super().__init__(".png", ".svg", ".pdf")

    def convert(self, value: Any, param: Param, ctx: Ctx) -> Path:
        if find_spec("matplotlib") is None:
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return super().convert(value, param, ctx)
