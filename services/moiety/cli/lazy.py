"""A click group that imports a command when it is used, not when it is listed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, NoReturn

import click

from moiety.core.text import did_you_mean

# Which extra brings a package, if not `serve`.
_EXTRAS: Mapping[str, str] = MappingProxyType({"matplotlib": "plot", "triton": "gpu"})


class LazyGroup(click.Group):
    """A group whose help imports none of its commands.

    `summaries` maps a command's name to its line in that help. The command itself is the attribute of that name of the
    module of that name in `package`. A command whose module needs a package that is not installed can still be asked for
    its help: the summary, and what to install.
    """

    def __init__(self, *args: Any, package: str, summaries: Mapping[str, str], **options: Any):
        super().__init__(*args, **options)
        self._package, self._summaries = package, summaries

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:  # click's own answer differs between its versions, and may be an error
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._summaries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._summaries:
            return None
        try:
            command: click.Command = getattr(import_module(f"{self._package}.{cmd_name}"), cmd_name)
        except ModuleNotFoundError as error:
            if install_hint(error) is None:
                raise
            return _without_its_package(cmd_name, self._summaries[cmd_name], error)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self._summaries and not name.startswith("-"):
            near = did_you_mean(name, self._summaries)
            there = "" if near else f"; there are {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"No such command {name!r}{near or there}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(self._summaries.items()))


def install_hint(error: ModuleNotFoundError) -> str | None:
    """Returns what the command needs and how to install it; None for a module of Moiety's own, which is a fault."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "moiety", "moiety_kernels"):
        return None
    extra = _EXTRAS.get(package, "serve")
    return f"this command needs {package}, of the extra {extra!r}: pip install 'moiety[{extra}]'"


def _without_its_package(name: str, summary: str, error: ModuleNotFoundError) -> click.Command:
    """Returns a command that has help, and raises `error` when it is run."""

    def fail(**_: object) -> NoReturn:
        raise error

    words = click.Argument(["words"], nargs=-1, type=click.UNPROCESSED, metavar="…")
    settings = {"ignore_unknown_options": True}
    hint = f"Its options are known once it can run: {install_hint(error)}"
    return click.Command(name, settings, fail, [words], help=f"{summary}\n\n{hint}")
