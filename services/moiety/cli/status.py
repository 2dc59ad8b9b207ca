"""`moiety status`."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import click

from moiety.cli.arguments import FiniteRange
from moiety.cli.json_output import json_output_option, print_json
from moiety.cli.run import run_async
from moiety.cli.setting_options import setting_option, settings_of_system
from moiety.config.running_systems import RunningSystem, is_running
from moiety.core.text import for_terminal

CLEAR = "\033[H\033[2J"  # moves to the top left and clears the screen


@click.command()
@setting_option("--registry", "registry", default="that of the system on this machine")
@setting_option("--app", "app", default="the only system on this machine, or moiety; a pid works too")
@click.option("--system", "part", default="", help="A part of the system's name, if several of this app are live.")
@click.option("--decisions", type=click.IntRange(1, 1000), default=5, help="How many of the last decisions to show.")
@click.option(
    "--watch", is_flag=True, help="Show it again and again until it ends, or Ctrl-C; with --json, one line each time."
)
@click.option("--every", "every_s", type=FiniteRange(0.2, 3600), default=2.0, help="Seconds between two of --watch.")
@json_output_option
def status(part: str, decisions: int, watch: bool, every_s: float, as_json: bool, **given: Any) -> None:
    """Show a running system: replicas, load, placement, decisions with their reasons, where the logs are.

    Without --registry, it is the system that `moiety serve` runs on this machine. Everything is read from the registry, so
    a system on a cluster needs its address only. Exit status 1 if there is no such system.

    \b
    Examples:
      moiety status --watch
      moiety status --json | jq .deployments
      moiety status --registry redis://redis.example:6379/0
    """
    from moiety.errors import RegistryUnreachable
    from moiety.tools.running.find import find_system
    from moiety.tools.running.snapshot import read_snapshot
    from moiety.tools.running.status_lines import status_lines

    settings = settings_of_system(**given)
    screen = watch and not as_json and sys.stdout.isatty()

    async def show() -> RunningSystem | None:
        snapshot = await read_snapshot(await find_system(settings, part), decisions)
        if not as_json:
            lines = "\n".join(status_lines(snapshot))
            lines = for_terminal(lines) if sys.stdout.isatty() else lines
            click.echo(f"{CLEAR if screen else ''}{time.strftime('%H:%M:%S  ') if watch else ''}{lines}")
        elif watch:
            click.echo(json.dumps(snapshot.to_json()))
        else:
            print_json(snapshot.to_json())
        return snapshot.found.local

    async def show_again() -> None:
        local = await show()  # there must be a system at first
        while True:
            await asyncio.sleep(every_s)
            if local is not None and not is_running(local):
                click.echo(f"{local.app} has ended", err=True)
                return
            try:
                local = await show()
            except RegistryUnreachable as error:
                click.echo(f"{CLEAR if screen else ''}{time.strftime('%H:%M:%S')}  {error}", err=not screen)

    if watch:
        run_async(show_again())
    else:
        run_async(show())
