"""A click group that imports a command when it is used, not when it is listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """A command that is imported only when it is used."""

    target: str  # `module:attribute` of the click command
    summary: str  # shown in the list of commands

    def load(self) -> click.Command:
        """Imports the command and returns it."""
        module, _, attribute = self.target.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


class LazyGroup(click.Group):
    """A group whose help imports none of its commands. `lazy` maps a command's name to its LazyCommand."""

    def __init__(self, *args: Any, lazy: Mapping[str, LazyCommand], **options: Any):
        super().__init__(*args, **options)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self.lazy.get(cmd_name)
        return found.load() if found else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in sorted(self.lazy.items())])
