"""`moiety bench hop` and `moiety bench serve`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import IntegerList, dtype_option, groups_option, invocation, json_option, write_json
from moiety.cli.run import progress, run_async

_rounds_option = click.option(
    "--rounds",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="How often the two systems take turns.",
)


@click.group()
def bench() -> None:
    """Measure this machine: the hop, and serving speed.

    Both benchmarks start what they need as child processes, take turns with a baseline, and leave nothing behind.
    Numbers mean something on a quiet machine only.
    """


@bench.command()
@click.option(
    "--payload",
    type=IntegerList(4, 16384, step=4),
    default="4,16,64,256,1024",
    show_default=True,
    help="KiB of rows in a call, and as many in its reply; multiples of 4 from 4 to 16384, with commas.",
)
@click.option(
    "--calls", type=click.IntRange(1, 1_000_000), default=200, show_default=True, help="Per payload and round."
)
@_rounds_option
@json_option
@click.pass_context
def hop(context: click.Context, payload: tuple[int, ...], calls: int, rounds: int, json_file: Path | None) -> None:
    """Measure the hop: a call to an expert replica and back, less the experts' own time.

    Beside it, in turns, a unary gRPC echo of the same bytes: what a call costs when nothing of ours is in it.

    \b
    Example:
      moiety bench hop --payload 16,256 --calls 1000
    """
    from moiety.tools.bench_hop import bench_hop, hop_lines
    from moiety.tools.bench_report import Machine

    machine = Machine.here()
    rows = run_async(bench_hop(payload_kib=payload, calls=calls, rounds=rounds, progress=progress()))
    for line in (*hop_lines(rows), *machine.lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])


@bench.command()
@click.argument("checkpoint", required=False)
@groups_option
@click.option(
    "--concurrency",
    type=IntegerList(1, 1024),
    default="1,8,32",
    show_default=True,
    help="Streams at once; 1 to 1024, with commas.",
)
@click.option("--prompt", type=click.IntRange(1, 1 << 20), default=64, show_default=True, help="Tokens per prompt.")
@click.option("--new", type=click.IntRange(2, 1 << 20), default=64, show_default=True, help="New tokens per stream.")
@dtype_option("bfloat16")
@_rounds_option
@json_option
@click.pass_context
def serve(
    context: click.Context,
    checkpoint: str | None,
    groups: int,
    concurrency: tuple[int, ...],
    prompt: int,
    new: int,
    dtype: str,
    rounds: int,
    json_file: Path | None,
) -> None:
    """Measure serving speed beside plain transformers, in turns, on the same checkpoint.

    CHECKPOINT is a folder with config.json and safetensors; without it a synthetic qwen3_moe of 90 M parameters is
    written and removed again. The served system is measured by a client of its gateway: attention, hop, experts,
    tokenising and streaming included. Plain transformers generates the same prompts as one batch, in this process.

    \b
    Example:
      moiety bench serve ./Qwen3-30B-A3B --groups 4 --concurrency 1,16 --json serve.json
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the services have it: huge pages for torch
    from moiety.tools.bench_report import Machine
    from moiety.tools.bench_serve import Workload, bench_serve, serve_lines

    workload = Workload(
        groups=groups, concurrency=concurrency, prompt_tokens=prompt, new_tokens=new, dtype=dtype, rounds=rounds
    )
    machine = Machine.here()
    report = run_async(bench_serve(checkpoint, workload, progress=progress()))
    for line in (*serve_lines(report), *machine.lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in report.rows])
