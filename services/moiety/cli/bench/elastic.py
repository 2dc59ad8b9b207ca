"""`moiety bench elastic`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moiety.cli.arguments import FiniteRange, PictureFile
from moiety.cli.options import invocation, json_option, write_json
from moiety.cli.run import progress, signals_interrupt


@click.command()
@click.option("--groups", type=click.IntRange(1, 8), default=2, help="Expert groups.")
@click.option(
    "--capacity",
    type=FiniteRange(10, 1e6),
    default=200.0,
    help="Rows per second that each expert replica is paced to, because replicas share this machine's cores.",
)
@click.option("--max-replicas", type=click.IntRange(2, 8), default=3, help="Most replicas per group.")
@click.option("--low", type=FiniteRange(0.05, 100), default=0.4, help="Requests per second while load is low.")
@click.option("--high", type=FiniteRange(0.1, 100), default=8.0, help="Requests per second while load is high.")
@click.option(
    "--seconds",
    type=(FiniteRange(5, 3600), FiniteRange(5, 3600), FiniteRange(5, 3600)),
    default=(10.0, 30.0, 40.0),
    help="Seconds of low load, of high load, and of low load again.",
)
@click.option("--zipf", type=FiniteRange(0, 4), default=1.6, help="Zipf exponent of the skew over prompts.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of prompts and arrivals.")
@click.option(
    "--plot",
    "plot_file",
    type=PictureFile(),
    help="Draw load and replicas over time into this .png, .svg or .pdf file (needs moiety[plot]).",
)
@json_option
@click.pass_context
def elastic(context: click.Context, /, plot_file: Path | None, json_file: Path | None, **options: Any) -> None:
    """Raise and lower a skewed load on a live Ray system, and check that only the hot group's replicas follow.

    Starts its own Ray, Redis and small model. Requests arrive as a Poisson process, with prompts drawn by Zipf's law. The
    likeliest prompts are those that send the most rows to one expert group, the hot group. This measures control, not
    speed: each replica is paced to --capacity, because replicas that share a few cores are not faster together. Exit
    status 1 if a request failed, if the hot group did not grow and shrink, or if another group changed.

    \b
    Example:
      moiety bench elastic --plot elastic.png
    """
    from moiety.bench.elastic.elastic import ElasticWork, bench_elastic
    from moiety.bench.elastic.report import elastic_lines, plot
    from moiety.tools.machine import Machine

    machine = Machine.here()
    work = ElasticWork(**options)
    with signals_interrupt():
        report = bench_elastic(work, progress=progress())
    for line in (*elastic_lines(report), *machine.lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, report.data())
    if plot_file is not None:
        plot(report, plot_file)
        click.echo(f"picture: {plot_file}")
    context.exit(0 if report.passed else 1)
