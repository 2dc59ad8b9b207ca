"""`moiety quantize`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moiety.cli.options import ByteCount, ModelName, check_first, local_model
from moiety.cli.run import progress, signals_interrupt


@click.command()
@click.argument("checkpoint", type=ModelName())
@click.option(
    "--memory", type=ByteCount(), required=True, help="Bytes that all weights together may take, such as 24GiB."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the new checkpoint; must be new or empty.",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with text like the text that the model will serve.  [default: English and code that ship with Python]",
)
@click.option("--tokens", type=click.IntRange(16, 1 << 20), default=4096, help="Most calibration tokens to use.")
def quantize(checkpoint: str, memory: int, out: Path, calibration: Path | None, tokens: int) -> None:
    """Quantise a checkpoint's experts, each to 16, 8 or 4 bits by its measured sensitivity.

    CHECKPOINT is a folder, or a Hugging Face id. Measures its experts on calibration text, one at a time: how much the
    model's hidden states change when the expert's weights are rounded to 8 or 4 bits, weighted by how often and how
    strongly the expert is used. Then chooses 16, 8 or 4 bits for each expert so that all weights fit into --memory at the
    least total error. The new checkpoint (format compressed-tensors) is served like any other, without a flag. Its folder
    also holds a report and a picture of the choice.

    \b
    Example:
      moiety quantize ./Qwen3-30B-A3B --memory 24GiB --out ./Qwen3-30B-A3B-24GiB
    """
    folder = local_model(checkpoint)
    check_first(folder)
    from moiety.model.checkpoint.checkpoint import Checkpoint
    from moiety.model.experts.cached import expert_layout
    from moiety.tools.quantize.corpus import shipped_text
    from moiety.tools.quantize.quantize import PICTURE, REPORT, quantise
    from moiety.tools.quantize.report import as_json, lines, picture

    text = calibration.read_text(encoding="utf-8", errors="replace") if calibration else shipped_text()
    with signals_interrupt():
        quantised = quantise(folder, out, memory, text, tokens=tokens, progress=progress())
    layout = expert_layout(Checkpoint.open(folder))
    (out / REPORT).write_text(json.dumps(as_json(quantised, layout, memory, checkpoint), indent=1), encoding="utf-8")
    title = f"{Path(checkpoint).name}: {quantised.nbytes / 2**30:.2f} of {memory / 2**30:.2f} GiB"
    (out / PICTURE).write_text(picture(quantised, layout, title), encoding="utf-8")
    for line in lines(quantised, memory):
        click.echo(line)
    click.echo(f"{out}: serve it like any checkpoint; {REPORT} and {PICTURE} show what was chosen and why")
