"""`moiety bench quantize`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import check_first, invocation, json_option, service_environment, write_json
from moiety.cli.run import progress, signals_interrupt


@click.command()
@click.option(
    "--model", help="Folder of a trained checkpoint.  [default: train a small model first, in a minute or two]"
)
@click.option("--steps", type=click.IntRange(10, 100_000), default=400, help="Steps of training.")
@click.option("--seed", type=int, default=0, help="Seed of the training.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the checkpoints in this folder.  [default: delete them at the end]",
)
@json_option
@click.pass_context
def quantize(
    context: click.Context, model: str | None, steps: int, seed: int, keep: Path | None, json_file: Path | None
) -> None:
    """Measure what quantised experts cost a trained model: perplexity and greedy agreement with bfloat16.

    Trains a small MoE on text that ships with Python. Stores its experts at 8 bits, at 4 bits, and at the mix that
    `moiety quantize` chooses for the same memory. Evaluates each variant with the kernels of the expert replicas, on text
    that neither training nor calibration used.

    \b
    Example:
      moiety bench quantize --keep /tmp/quantised --json quality.json
    """
    service_environment()
    if model is not None:
        check_first(model)
    from moiety.bench.quantize import bench_quantize, quality_lines
    from moiety.config.run_folder import scratch_folder
    from moiety.tools.machine import Machine

    with signals_interrupt(), scratch_folder() as scratch:
        work = keep or scratch
        rows = bench_quantize(work, model=model, steps=steps, seed=seed, progress=progress())
    for line in (*quality_lines(rows), *Machine.here().lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, [asdict(row) for row in rows])
