"""`moiety bench experts`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moiety.cli.options import IntegerList, WordList, invocation, json_option, service_environment, write_json
from moiety.cli.run import progress, signals_interrupt


@click.command()
@click.option("--hidden", type=click.IntRange(128, 1 << 16), default=1024, help="Hidden size: the length of a row.")
@click.option("--intermediate", type=click.IntRange(128, 1 << 16), default=512, help="Intermediate size of an expert.")
@click.option(
    "--rows",
    type=IntegerList(1, 4096),
    default="1,2,4,8,32,256",
    help="Rows per expert; several values separated by commas.",
)
@click.option(
    "--dtypes",
    type=WordList(),
    default="bfloat16,float32,int8,int4",
    help="Data types of the weights, separated by commas.",
)
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads that compute.  [default: one per usable core]")
@json_option
@click.pass_context
def experts(context: click.Context, /, json_file: Path | None, dtypes: tuple[str, ...], **options: Any) -> None:
    """Measure the experts' kernels beside plain torch: weight bandwidth and matrix products.

    The same run measures the machine's read bandwidth and matmul rate. Up to 8 rows per expert, reading weights is the
    limit: see the column "of read". With more rows, matrix products are the limit: see "of matmul". The last column is
    how many times faster Moiety's kernels are than plain torch: the faster of an eager loop and torch._grouped_mm. Where
    Moiety's weights are quantised, torch's are bfloat16. The last lines are a cost model fitted to these times, of the
    form that the policies use.

    \b
    Example:
      moiety bench experts --dtypes bfloat16,int4 --rows 1,8 --json experts.json
    """
    service_environment()
    from moiety.bench.experts import DTYPES, bench_experts, experts_lines
    from moiety.tools.machine import Machine

    if unknown := sorted({*dtypes} - {*DTYPES}):
        raise click.UsageError(f"--dtypes {', '.join(unknown)}: must be among {', '.join(DTYPES)}")
    machine = Machine.here()
    with signals_interrupt():
        report = bench_experts(dtypes=dtypes, progress=progress(), **options)
    for line in (*experts_lines(report), *machine.lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, {"machine": asdict(machine), **asdict(report)})
