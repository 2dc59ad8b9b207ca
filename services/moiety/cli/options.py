"""Option types, and options that several commands share."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from moiety.config.services import DTYPES

Function = TypeVar("Function", bound=Callable[..., Any])


class IntegerList(click.ParamType[tuple[int, ...]]):
    """Integers with commas between them, each from `low` to `high` and a multiple of `step`."""

    name = "integers"

    def __init__(self, low: int, high: int, step: int = 1):
        self.low, self.high, self.step = low, high, step
        self.bound = f"integers from {low} to {high}" + (f", multiples of {step}" if step > 1 else "")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: must be {self.bound}, with commas between them", param, ctx)
        for number in numbers:
            if not self.low <= number <= self.high or number % self.step:
                self.fail(f"{number}: must be {self.bound}", param, ctx)
        return numbers


class TokenBias(click.ParamType[tuple[int, float]]):
    """A token id and what is added to its logit, as ID=BIAS."""

    name = "id=bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        if isinstance(value, tuple):
            return value
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r}: must be ID=BIAS, such as 42=-100", param, ctx)


class ByteCount(click.ParamType[int]):
    """A number of bytes, as `24GiB`, `80GB` or a plain number."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(TypeAdapter(ByteSize).validate_python(value))
        except ValidationError:
            self.fail(f"{value!r}: must be a number of bytes, such as 24GiB", param, ctx)


class WordList(click.ParamType[tuple[str, ...]]):
    """Words with commas between them."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        words = value if isinstance(value, tuple) else tuple(str(value).split(","))
        if not all(words):
            self.fail(f"{value!r}: must be words with commas between them", param, ctx)
        return words


class Size(click.ParamType[int]):
    """Bytes, with a unit or without: 24GiB, 500MB, 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pydantic import ByteSize, TypeAdapter, ValidationError

        try:
            return int(TypeAdapter(ByteSize).validate_python(value))
        except ValidationError:
            self.fail(f"{value!r}: must be bytes, such as 24GiB or 500MB", param, ctx)


TOKEN_BIAS = TokenBias()
SIZE = Size()


def groups_option(function: Function) -> Function:
    """--groups."""
    return click.option(
        "--groups",
        type=click.IntRange(min=1),
        default=2,
        show_default=True,
        help="Expert groups, each a process of its own; at most the model's experts per layer.",
    )(function)


def dtype_option(default: str) -> Callable[[Function], Function]:
    """--dtype."""
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=default,
        show_default=True,
        help="Of weights and rows; auto: as published.",
    )


def json_option(function: Function) -> Function:
    """--json FILE, as `json_file`."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        callback=_writable,
        help="Write the result to this file too.",
    )(function)


def write_json(file: Path | None, value: object) -> None:
    """Writes `value` for people and machines; nothing where no file was asked for."""
    if file is not None:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def invocation(context: click.Context) -> str:
    """The command line that does the same again, defaults spelled out."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value is None or parameter.name == "json_file":
            continue
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words += [parameter.opts[0]] if value else []
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [text] if isinstance(parameter, click.Argument) else [parameter.opts[0], text]
    return shlex.join(words)


def _writable(_context: click.Context, _parameter: click.Parameter, file: Path | None) -> Path | None:
    """A file that cannot be written is told before the work, not after it."""
    if file is not None and not file.parent.is_dir():
        raise click.BadParameter(f"{file.parent} is no folder")
    return file


rounds_option = click.option(
    "--rounds",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="How often the systems take turns.",
)


def service_environment() -> None:
    """What services start with, for what this process computes itself: before torch is imported."""
    from moiety.compose.environment import PROCESS_ENVIRONMENT

    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
