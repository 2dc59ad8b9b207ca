"""`moiety bench hop`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import IntegerList, invocation, json_option, rounds_option, write_json
from moiety.cli.run import progress, run_async


@click.command()
@click.option(
    "--payload",
    type=IntegerList(4, 16384, step=4),
    default="4,16,64,256,1024",
    help="KiB of rows in a call and in its reply: multiples of 4 from 4 to 16384, separated by commas.",
)
@click.option("--calls", type=click.IntRange(1, 1_000_000), default=200, help="Calls per payload and round.")
@rounds_option
@json_option
@click.pass_context
def hop(context: click.Context, payload: tuple[int, ...], calls: int, rounds: int, json_file: Path | None) -> None:
    """Measure the hop over each transport: a call to an expert replica and back, less the experts' own time.

    The baseline is a unary gRPC echo of the same bytes: a call without Moiety's code. Transports and echo take turns.

    \b
    Example:
      moiety bench hop --payload 16,256 --calls 1000
    """
    from moiety.bench.hop import bench_hop, hop_lines
    from moiety.tools.machine import Machine

    machine = Machine.here()
    rows = run_async(bench_hop(payload_kib=payload, calls=calls, rounds=rounds, progress=progress()))
    for line in (*hop_lines(rows), *machine.lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])
