"""The option for JSON in place of text. Needs nothing that a plain `pip install moiety` lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def json_output_option(function: Function) -> Function:
    """Adds the flag --json, passed as `as_json`: JSON instead of text, on stdout.

    It takes no file, as --json of other commands does: in `generate --json TEXT` that would be the prompt.
    """
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(function)


def print_json(value: object) -> None:
    """Prints `value` as indented JSON."""
    click.echo(json.dumps(value, indent=2))
