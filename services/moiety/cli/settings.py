"""`moiety settings`."""

from __future__ import annotations

import click

from moiety.config.catalogue import catalogue
from moiety.core.text import did_you_mean


@click.command()
@click.argument("words", nargs=-1)
def settings(words: tuple[str, ...]) -> None:
    """List the settings of a system: name, default, environment variable, and what each means.

    With WORDS, only those whose name contains one of them. `moiety serve --set NAME=VALUE` sets one. In a YAML file, in the
    arguments of `serve deploy` and under `app` in the Helm chart, a dot is a level of nesting.

    \b
    Examples:
      moiety settings
      moiety settings router overflow
    """
    there = tuple(catalogue())
    for word in words:
        if not any(word in setting.name for setting in there):
            near = did_you_mean(word, (part for setting in there for part in (setting.name, *setting.name.split("."))))
            raise click.UsageError(f"no setting has {word!r} in its name{near}")
    for setting in there:
        if not words or any(word in setting.name for word in words):
            value = f" = {setting.default}" if setting.default else ""
            click.echo(f"{setting.name}{value}  [{setting.variable}]\n    {setting.description}")
