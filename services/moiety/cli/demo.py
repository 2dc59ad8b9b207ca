"""`moiety demo`."""

from __future__ import annotations

import click

from moiety.cli.arguments import FiniteRange
from moiety.cli.run import signals_interrupt


@click.command()
@click.option(
    "--seconds",
    type=FiniteRange(10, 600),
    default=60.0,
    help="Longest wait for one event, in seconds; the start of the system may take three times as long.",
)
def demo(seconds: float) -> None:
    """Show the whole system at work on this machine, from start to end.

    Writes a small checkpoint with random weights, serves it on its own Ray and Redis, streams a generation, loads one
    expert group until it scales up, prints one trace, kills an expert replica during a generation, and stops everything
    it started. It leaves no process and no file behind.

    \b
    Example:
      moiety demo --seconds 120
    """
    from moiety.tools.demo import run_demo

    with signals_interrupt():
        run_demo(click.echo, seconds)
