"""`moiety demo`."""

from __future__ import annotations

import click

from moiety.cli.run import signals_interrupt


@click.command()
@click.option("--seconds", type=click.FloatRange(10, 600), default=60.0, show_default=True, help="Bound on each wait.")
def demo(seconds: float) -> None:
    """Show the main job on this machine, start to end.

    Makes a small checkpoint with random weights, serves it on a Ray and a Redis of its own, streams a generation, heats
    one expert group until it grows, prints one trace, kills an expert replica in the middle of a generation, and ends
    all it started. Nothing is left behind.

    \b
    Example:
      moiety demo --seconds 120
    """
    from moiety.tools.demo import run_demo

    with signals_interrupt():
        run_demo(click.echo, seconds)
