"""`moiety bench lanes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moiety.cli.bench.engine_options import engine_options, prepare, run_engine_benchmark


@click.command()
@engine_options(concurrency="1,2,4,8,16,32,64")
@click.pass_context
def lanes(context: click.Context, /, json_file: Path | None, **options: Any) -> None:
    """Measure lanes: a step's batch in one piece, in two parts that take turns, and in the way the router chooses.

    The parts are lanes: while one lane waits for its experts, the other computes. But each lane reads weights by itself,
    even those that the other lane reads too. By default, a router tries one piece and two lanes for each size of step, and
    keeps the faster way. This benchmark shows the decode tokens/s of each way on this machine.

    \b
    Example:
      moiety bench lanes --concurrency 8,64
    """
    prepare(options)
    from moiety.bench.engines.lanes import bench_lanes, lanes_lines

    run_engine_benchmark(context, json_file, bench_lanes, lanes_lines, options)
