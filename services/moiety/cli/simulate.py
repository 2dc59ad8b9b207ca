"""`moiety simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moiety.cli.arguments import FiniteRange, PictureFile
from moiety.cli.options import invocation, json_option, write_json
from moiety.cli.run import progress


@click.command()
@click.option("--hours", type=FiniteRange(0.1, 168), default=24.0, help="Hours to simulate.")
@click.option("--step", "step_s", type=FiniteRange(0.5, 60), default=20.0, help="Seconds per time step.")
@click.option("--tokens", "mean", type=FiniteRange(1e3, 1e8), default=0.9e6, help="Mean load, tokens per second.")
@click.option("--peak", "peak_over_mean", type=FiniteRange(1.05, 4), default=2.0, help="Peak load over mean load.")
@click.option("--skew", type=FiniteRange(0, 2), default=0.8, help="Zipf exponent of the experts' popularity.")
@click.option(
    "--start",
    "start_s",
    type=FiniteRange(0, 600),
    default=30.0,
    help="Seconds from a decision to the first row that the new replica computes.",
)
@click.option("--groups", type=click.IntRange(1, 256), default=32, help="Expert groups.")
@click.option("--hot-sets", type=click.IntRange(0, 64), default=4, help="Most hot sets.")
@click.option("--seed", type=click.IntRange(0), default=0, help="The same seed gives the same day.")
@click.option(
    "--plot",
    "picture",
    type=PictureFile(),
    help="Draw load and replicas over time into this .png, .svg or .pdf file (needs moiety[plot]).",
)
@json_option
@click.pass_context
def simulate(
    context: click.Context,
    /,
    groups: int,
    hot_sets: int,
    start_s: float,
    picture: Path | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Simulate a day of a large cluster, to estimate what elasticity would save.

    The model has DeepSeek-V3's size. Scaling policy, placement and cost model are the code of the served system; load and
    time are synthetic. Moiety's elastic system is compared with whole engines, EPLB, a static size and a clairvoyant bound.
    Each of these gets the smallest size, among those tried, whose p99 decode step is no longer than the elastic system's;
    if none is, the largest size. Devices for attention are not counted.

    \b
    Example:
      moiety simulate --plot day.png --json day.json
    """
    from moiety.simulate.report import compare, lines, plot
    from moiety.simulate.scenario import Cluster, day_trace

    cluster = Cluster(groups=groups, hot_sets=hot_sets, start_s=start_s)
    trace = day_trace(**options)
    report = compare(cluster, trace, progress())
    for line in (*lines(report), f"rerun:   {invocation(context)}"):
        click.echo(line)
    if picture is not None:
        plot(report, picture)
    write_json(json_file, report.json())
