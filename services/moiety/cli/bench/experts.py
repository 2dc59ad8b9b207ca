"""`moiety bench experts`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import IntegerList, WordList, invocation, json_option, write_json
from moiety.cli.run import progress, signals_interrupt


@click.command()
@click.option("--hidden", type=click.IntRange(128, 1 << 16), default=1024, show_default=True)
@click.option("--intermediate", type=click.IntRange(128, 1 << 16), default=512, show_default=True)
@click.option(
    "--rows", type=IntegerList(1, 4096), default="1,2,4,8,32,256", show_default=True, help="Per expert; with commas."
)
@click.option("--dtypes", type=WordList(), default="bfloat16,float32,int8,int4", show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: every core]")
@json_option
@click.pass_context
def experts(
    context: click.Context,
    hidden: int,
    intermediate: int,
    rows: tuple[int, ...],
    dtypes: tuple[str, ...],
    threads: int | None,
    json_file: Path | None,
) -> None:
    """Measure the experts' kernels: weights streamed and products computed, beside plain torch.

    Up to 8 rows per expert what counts is the share of the machine's read bandwidth, beyond that the share of its matmul
    rate; both are measured at the same time. The last column is the best plain torch path's time over ours: the eager loop,
    or torch._grouped_mm, on bfloat16 weights where ours are quantised. The cost model that follows from it is what the
    policies plan with.

    \b
    Example:
      moiety bench experts --dtypes bfloat16,int4 --rows 1,8 --json experts.json
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the services have it: huge pages for torch
    from moiety.bench.experts import DTYPES, bench_experts, experts_lines
    from moiety.tools.machine import Machine

    if unknown := sorted({*dtypes} - {*DTYPES}):
        raise click.UsageError(f"--dtypes {', '.join(unknown)}: must be of {', '.join(DTYPES)}")
    machine = Machine.here()
    with signals_interrupt():
        report = bench_experts(
            hidden=hidden, intermediate=intermediate, rows=rows, dtypes=dtypes, threads=threads, progress=progress()
        )
    for line in (*experts_lines(report), *machine.lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, {"machine": asdict(machine), **asdict(report)})
