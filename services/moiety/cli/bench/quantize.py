"""`moiety bench quantize`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import invocation, json_option, write_json
from moiety.cli.run import progress, signals_interrupt


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
    from moiety.bench.quantize import bench_quantize, quality_lines
    from moiety.tools.machine import Machine

    with signals_interrupt(), tempfile.TemporaryDirectory(prefix="moiety-quantize-") as scratch:
        work = keep or Path(scratch)
        rows = bench_quantize(work, model=model, steps=steps, seed=seed, progress=progress())
    for line in (*quality_lines(rows), *Machine.here().lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])
