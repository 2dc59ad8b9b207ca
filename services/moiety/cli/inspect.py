"""`moiety inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moiety.cli.options import ByteCount, json_option, write_json


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=str))
@click.option(
    "--memory",
    type=ByteCount(),
    help="Memory of one expert replica, such as 24GiB; the report then suggests a number of groups.",
)
@json_option
def inspect(checkpoint: str, memory: int | None, json_file: Path | None) -> None:
    """Report how large a checkpoint and its parts are, without reading a weight.

    CHECKPOINT is a folder with config.json and safetensors; only the headers of the safetensors are read. Exit status 1,
    with the reason, if the checkpoint cannot be served.

    \b
    Example:
      moiety inspect ./DeepSeek-V3 --memory 80GiB
    """
    from moiety.model.checkpoint.checkpoint import Checkpoint
    from moiety.tools.inspect_checkpoint import inspect as inspect_checkpoint
    from moiety.tools.inspect_checkpoint import lines

    inspection = inspect_checkpoint(Checkpoint.open(checkpoint), memory)
    for line in lines(inspection):
        click.echo(line)
    write_json(json_file, asdict(inspection))
