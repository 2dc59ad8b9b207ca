"""`moiety bench flood`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moiety.cli.arguments import FiniteRange
from moiety.cli.bench.model_check import check_model
from moiety.cli.options import (
    IntegerList,
    dtype_option,
    groups_option,
    invocation,
    json_option,
    rounds_option,
    write_json,
)
from moiety.cli.run import progress, run_async


@click.command()
@click.option(
    "--model", default="small", help="Synthetic model small or large (see bench serve), or a checkpoint folder."
)
@groups_option
@click.option("--slots", type=click.IntRange(1, 1024), default=8, help="Requests that run at once.")
@click.option("--queue", type=click.IntRange(1, 1024), default=8, help="Requests that may wait.")
@click.option(
    "--loads",
    type=IntegerList(1, 64),
    default="1,2,4",
    help="Requests offered per second, as multiples of the measured capacity; separated by commas.",
)
@click.option("--seconds", type=FiniteRange(1, 600), default=15.0, help="Seconds per load.")
@click.option("--prompt", "prompt_tokens", type=click.IntRange(1, 1 << 20), default=32, help="Tokens per prompt.")
@click.option("--new", "new_tokens", type=click.IntRange(1, 1 << 20), default=32, help="New tokens per request.")
@dtype_option("bfloat16")
@rounds_option
@json_option
@click.pass_context
def flood(context: click.Context, /, json_file: Path | None, **options: Any) -> None:
    """Offer more requests than can be served, and check tokens/s of accepted ones and retry delays of refusals.

    First measures the capacity: the requests served per second while every slot and half of the queue are occupied.
    Then sends requests at multiples of this rate, without waiting for earlier ones. Exit status 1 if accepted requests
    get less than 95 % of the peak tokens/s at 2 or more times the capacity, if a refusal carries no retry delay, or if a
    request fails for another reason.

    \b
    Example:
      moiety bench flood --loads 1,2,4 --seconds 30
    """
    check_model(options)
    from moiety.bench.flood import FloodWork, bench_flood, flood_lines
    from moiety.tools.machine import Machine

    machine = Machine.here()
    work = FloodWork(**options)
    report = run_async(bench_flood(work, progress=progress()))
    for line in (*flood_lines(report), *machine.lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, {"machine": asdict(machine), "rows": [asdict(row) for row in report.rows]})
    context.exit(0 if report.passed else 1)
