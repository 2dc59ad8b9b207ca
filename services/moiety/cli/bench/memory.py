"""`moiety bench memory`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import invocation, json_option, write_json
from moiety.cli.run import progress, run_async


@click.command()
@click.option(
    "--gigabytes", type=click.FloatRange(0.05, 1000), default=2.2, show_default=True, help="Of experts, in bfloat16."
)
@click.option("--groups", type=click.IntRange(1, 64), default=1, show_default=True, help="Replicas to share them.")
@json_option
@click.pass_context
def memory(context: click.Context, gigabytes: float, groups: int, json_file: Path | None) -> None:
    """Measure the memory of expert replicas at its peak, from start to first answers, over the weights they hold.

    A synthetic checkpoint is served as it is, with experts quantised to 8 bits as they are loaded, and published at 4 bits.
    Exit status 0 only where every replica's process stays within 1.15 times its weights and 200 MB.

    \b
    Example:
      moiety bench memory --gigabytes 4 --groups 1
    """
    from moiety.bench.memory import bench_memory, memory_lines
    from moiety.tools.machine import Machine

    with tempfile.TemporaryDirectory(prefix="moiety-memory-") as scratch:
        rows = run_async(bench_memory(Path(scratch), gigabytes=gigabytes, groups=groups, progress=progress()))
    for line in (*memory_lines(rows), *Machine.here().lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])
    context.exit(0 if all(row.ok for row in rows) else 1)
