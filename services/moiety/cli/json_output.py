"""The option for JSON in place of text. Needs nothing that a plain `pip install moiety` lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from moiety.cli.arguments import OutputFile

Function = TypeVar("Function", bound=Callable[..., Any])


def json_output_option(function: Function) -> Function:
    """Adds the option --json [FILE], passed as `json_file`: JSON instead of text, on stdout unless a file is given."""
    return click.option(
        "--json",
        "json_file",
        is_flag=False,
        flag_value="-",
        metavar="[FILE]",
        type=OutputFile(stdout=True),
        help="Write JSON instead of text: to FILE, by default to stdout.",
    )(function)


def print_json(file: Path, value: object) -> None:
    """Writes `value` as indented JSON to `file`, or to stdout if that is `-`."""
    text = json.dumps(value, indent=2)
    if file == Path("-"):
        click.echo(text)
    else:
        file.write_text(f"{text}\n", encoding="utf-8")
