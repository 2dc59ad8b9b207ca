"""`moiety bench split`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiety.cli.bench.engine_options import ask_engines, engine_options
from moiety.cli.options import (
    service_environment,
)

if TYPE_CHECKING:
    pass


@click.command()
@engine_options(concurrency="1,8,32")
@click.pass_context
def split(context: click.Context, /, json_file: Path | None, **asked: Any) -> None:
    """Measure what the split costs: one engine, its experts in its own process and in services on this machine.

    The same engine and kernels on the same prompts, in turns, asked directly: no gateway, no tokenising. Beside the two
    inter-token latencies stand, for a decode layer, the experts' compute, the hop, and how unevenly the groups work.

    \b
    Example:
      moiety bench split --concurrency 1,8,32 --json split.json
    """
    service_environment()
    from moiety.bench.engines.split import bench_split, split_lines

    ask_engines(context, json_file, bench_split, split_lines, asked)
