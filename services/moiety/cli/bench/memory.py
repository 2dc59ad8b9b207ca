"""`moiety bench memory`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.arguments import FiniteRange
from moiety.cli.options import invocation, json_option, write_json
from moiety.cli.run import progress, run_async
from moiety.errors import ConfigError


@click.command()
@click.option("--gigabytes", type=FiniteRange(0.05, 1000), default=2.2, help="Gigabytes of expert weights in bfloat16.")
@click.option("--groups", type=click.IntRange(1, 64), default=1, help="Expert replicas that share the weights.")
@json_option
@click.pass_context
def memory(context: click.Context, gigabytes: float, groups: int, json_file: Path | None) -> None:
    """Compare the peak memory of expert replicas, from start to first answers, with the weights they hold.

    Serves a synthetic model three times: in bfloat16, with experts quantised to 8 bits on load, and from a checkpoint
    whose experts are stored at 4 bits.
    Exit status 0 only if every replica's process stays within 1.15 times its weights plus 200 MB.

    \b
    Example:
      moiety bench memory --gigabytes 4 --groups 1
    """
    from moiety.tools.machine import Machine, free_bytes

    free = free_bytes(tempfile.gettempdir())
    if free is not None and 1.5e9 * gigabytes > free:  # in bfloat16, and at 4 bits
        bound = f"must be at most {free / 1.5e9:.1f}: {tempfile.gettempdir()} has {free / 1e9:.1f} GB free"
        raise ConfigError("gigabytes", gigabytes, bound)
    from moiety.bench.memory import bench_memory, memory_lines
    from moiety.config.run_folder import scratch_folder

    with scratch_folder() as scratch:
        rows = run_async(bench_memory(scratch, gigabytes=gigabytes, groups=groups, progress=progress()))
    for line in (*memory_lines(rows), *Machine.here().lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])
    context.exit(0 if all(row.ok for row in rows) else 1)
