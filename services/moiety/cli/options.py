"""Option types, the options that several commands share, and how results are written as JSON."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from moiety.cli.run import progress, signals_interrupt
from moiety.config.options import DTYPES

Function = TypeVar("Function", bound=Callable[..., Any])


class IntegerList(click.ParamType[tuple[int, ...]]):
    """Option type: integers separated by commas, each from `low` to `high` and a multiple of `step`."""

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
            self.fail(f"{value!r}: must be {self.bound}, separated by commas", param, ctx)
        for number in numbers:
            if not self.low <= number <= self.high or number % self.step:
                self.fail(f"{number}: must be {self.bound}", param, ctx)
        return numbers


class ByteCount(click.ParamType[int]):
    """Option type: a number of bytes, with or without a unit: 24GiB, 500MB, 1000000."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(TypeAdapter(ByteSize).validate_python(value))
        except ValidationError:
            self.fail(f"{value!r}: must be a number of bytes, such as 24GiB", param, ctx)


class WordList(click.ParamType[tuple[str, ...]]):
    """Option type: words separated by commas."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        words = value if isinstance(value, tuple) else tuple(str(value).split(","))
        if not all(words):
            self.fail(f"{value!r}: must be words separated by commas", param, ctx)
        return words


class ModelName(click.ParamType[str]):
    """Option type: a checkpoint folder, or a Hugging Face id such as Qwen/Qwen3-30B-A3B. `local_model` makes it a folder."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from moiety.model.hub import is_model_id

        if not (value and Path(value).exists()) and not is_model_id(str(value)):
            self.fail(f"{str(value)!r}: neither a folder nor a Hugging Face id, such as Qwen/Qwen3-30B-A3B", param, ctx)
        return str(value)


def local_model(model: str, revision: str | None = None) -> str:
    """Returns the folder of `model`; downloads a Hugging Face id first, with progress on stderr.

    Raises CheckpointError if it cannot be had, Interrupted on SIGINT or SIGTERM.
    """
    from moiety.model.hub import local_folder

    with signals_interrupt():
        return str(local_folder(model, revision, say=progress()))


def revision_option(function: Function) -> Function:
    """Adds the option --revision, passed as `hub_revision`: the setting `revision` is another thing."""
    return click.option(
        "--revision",
        "hub_revision",
        help="Branch, tag or commit of a Hugging Face id.  [default: main]",
    )(function)


def groups_option(function: Function) -> Function:
    """Adds the option --groups."""
    return click.option(
        "--groups",
        type=click.IntRange(min=1),
        default=2,
        help="Expert groups, each in its own process; at most the model's experts per layer.",
    )(function)


def dtype_option(default: str) -> Callable[[Function], Function]:
    """Returns a decorator that adds the option --dtype."""
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=default,
        help="Data type of weights and rows (hidden states); auto: as published.",
    )


def json_option(function: Function) -> Function:
    """Adds the option --json FILE, passed as `json_file`."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        callback=_writable,
        help="Also write the result to this file, as JSON.",
    )(function)


def request_timeout_option(function: Function) -> Function:
    """Adds the option --timeout SECONDS of one request, passed as `timeout_s`."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True),
        default=600.0,
        help="Seconds for one request.",
    )(function)


def api_key_option(function: Function) -> Function:
    """Adds the option --api-key KEY, passed as `api_key`."""
    return click.option(
        "--api-key",
        metavar="KEY",
        envvar="OPENAI_API_KEY",
        show_envvar=True,
        help="Key that the server asks for. The variable keeps it out of the list of processes.",
    )(function)


def write_json(file: Path | None, value: object) -> None:
    """Writes `value` to `file` as indented JSON; does nothing where `file` is None."""
    if file is not None:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def invocation(context: click.Context) -> str:
    """Returns the command line that repeats this run: options with a value, defaults included.

    It leaves out --json, and --api-key, which is a secret.
    """
    words = context.command_path.split()
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value in (None, ()) or parameter.name in ("json_file", "api_key"):
            continue
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words += [parameter.opts[0]] if value else []
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [text] if isinstance(parameter, click.Argument) else [parameter.opts[0], text]
    return shlex.join(words)


def _writable(_context: click.Context, _parameter: click.Parameter, file: Path | None) -> Path | None:
    """Callback of --json: rejects a file whose folder is missing, before the command does its work."""
    if file is not None and not file.parent.is_dir():
        raise click.BadParameter(f"{file.parent} is not a folder")
    return file


rounds_option = click.option(
    "--rounds",
    type=click.IntRange(1, 100),
    default=3,
    help="Rounds of measurement; systems that are compared take turns in each round.",
)


def service_environment() -> None:
    """Sets, in this process, the environment variables that services start with: for commands that compute here.

    Must be called before torch is imported. Variables that are set already keep their values.
    """
    from moiety.compose.environment import PROCESS_ENVIRONMENT

    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
