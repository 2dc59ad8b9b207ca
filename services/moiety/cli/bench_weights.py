"""`moiety bench experts`, `memory` and `quantize`: the experts' kernels, their memory, and what quantising costs a model."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import IntegerList, WordList, invocation, json_option, write_json
from moiety.cli.run import progress, run_async, signals_interrupt


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
    from moiety.tools.bench_experts import DTYPES, bench_experts, experts_lines
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


@click.command()
@click.option("--model", help="A checkpoint folder.  [default: a small model, trained first, in a minute or two]")
@click.option("--steps", type=click.IntRange(10, 100_000), default=400, show_default=True, help="Of training.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the checkpoints in this folder.")
@json_option
@click.pass_context
def quantize(
    context: click.Context, model: str | None, steps: int, seed: int, keep: Path | None, json_file: Path | None
) -> None:
    """Measure what quantised experts cost a trained model: perplexity and greedy agreement against bfloat16.

    A small MoE is trained on text that ships with Python; its experts are held at 8 bits, at 4 bits, and mixed as `moiety
    quantize` chooses for the same memory. All are evaluated on text that neither training nor calibration saw, by the
    kernels that serve them.

    \b
    Example:
      moiety bench quantize --keep /tmp/quantised --json quality.json
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from moiety.tools.bench_quantize import bench_quantize, quality_lines
    from moiety.tools.machine import Machine

    with signals_interrupt(), tempfile.TemporaryDirectory(prefix="moiety-quantize-") as scratch:
        work = keep or Path(scratch)
        rows = bench_quantize(work, model=model, steps=steps, seed=seed, progress=progress())
    for line in (*quality_lines(rows), *Machine.here().lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])


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
    from moiety.tools.bench_memory import bench_memory, memory_lines
    from moiety.tools.machine import Machine

    with tempfile.TemporaryDirectory(prefix="moiety-memory-") as scratch:
        rows = run_async(bench_memory(Path(scratch), gigabytes=gigabytes, groups=groups, progress=progress()))
    for line in (*memory_lines(rows), *Machine.here().lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])
    context.exit(0 if all(row.ok for row in rows) else 1)
