"""`moiety bench split`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moiety.cli.bench.engine_options import engine_options, prepare, run_engine_benchmark


@click.command()
@engine_options(concurrency="1,8,32")
@click.pass_context
def split(context: click.Context, /, json_file: Path | None, **options: Any) -> None:
    """Measure what the split costs: one engine with its experts in its own process and in services.

    Both ways use the same kernels and prompts and run in turns, without gateway or tokenising. Prints the inter-token
    latency of both ways. For a decode layer, prints the experts' compute time, the hop, and the imbalance. The imbalance is
    the slowest group's compute time divided by the mean of all groups.

    \b
    Example:
      moiety bench split --concurrency 1,8,32 --json split.json
    """
    prepare(options)
    from moiety.bench.engines.split import bench_split, split_lines

    run_engine_benchmark(context, json_file, bench_split, split_lines, options)
