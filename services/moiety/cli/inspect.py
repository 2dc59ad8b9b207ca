"""`moiety inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from moiety.cli.options import ByteCount, ModelName, json_option, local_model, revision_option, write_json
from moiety.config.options import Verify


@click.command()
@click.argument("checkpoint", type=ModelName())
@revision_option
@click.option(
    "--memory",
    type=ByteCount(),
    help="Memory of one expert replica, such as 24GiB; the report then suggests a number of groups.",
)
@click.option(
    "--verify",
    type=click.Choice(get_args(Verify)),
    default="sampled",
    show_default=True,
    help="What the revision covers: parts of every tensor, or every byte.",
)
@json_option
def inspect(
    checkpoint: str, hub_revision: str | None, memory: int | None, verify: Verify, json_file: Path | None
) -> None:
    """Report how large a checkpoint and its parts are, and its revision.

    CHECKPOINT is a folder with config.json and safetensors, or a Hugging Face id, which is downloaded; of the safetensors,
    the headers and a few blocks of every tensor are read. Exit status 1, with the reason, if the checkpoint cannot be served.

    \b
    Example:
      moiety inspect ./DeepSeek-V3 --memory 80GiB
    """
    from moiety.model.checkpoint.checkpoint import Checkpoint
    from moiety.tools.inspect_checkpoint import inspect as inspect_checkpoint
    from moiety.tools.inspect_checkpoint import lines

    inspection = inspect_checkpoint(Checkpoint.open(local_model(checkpoint, hub_revision)), memory, verify)
    for line in lines(inspection):
        click.echo(line)
    write_json(json_file, asdict(inspection))
