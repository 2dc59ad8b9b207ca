"""What `moiety bench split` and `moiety bench lanes` have in common: their options, and how they run and print."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiety.cli.options import (
    Function,
    IntegerList,
    dtype_option,
    groups_option,
    invocation,
    json_option,
    rounds_option,
    write_json,
)
from moiety.cli.run import progress, run_async

if TYPE_CHECKING:
    from moiety.bench.engines.engine_runner import EngineWork


def engine_options(concurrency: str) -> Callable[[Function], Function]:
    """What a benchmark that asks engines directly can be told."""

    def decorate(function: Function) -> Function:
        model_help = "small, large (see bench serve), or a checkpoint folder."
        tokens = click.IntRange(1, 1 << 20)
        for option in (
            json_option,
            rounds_option,
            dtype_option("bfloat16"),
            click.option("--new", type=click.IntRange(3, 1 << 20), default=64, show_default=True, help="New tokens."),
            click.option("--prompt", type=tokens, default=64, show_default=True, help="Tokens per prompt."),
            click.option(
                "--concurrency",
                type=IntegerList(1, 1024),
                default=concurrency,
                show_default=True,
                help="Streams at once; with commas.",
            ),
            groups_option,
            click.option("--model", default="large", show_default=True, help=model_help),
        ):
            function = option(function)
        return function

    return decorate


def ask_engines(
    context: click.Context,
    json_file: Path | None,
    measure: Callable[..., Coroutine[Any, Any, tuple[Any, ...]]],
    lines: Callable[[Sequence[Any], EngineWork], Iterator[str]],
    asked: Mapping[str, Any],
) -> None:
    """Runs `measure` with the options `asked`, prints `lines` of its rows, and writes them to `json_file`."""
    from moiety.bench.engines.engine_runner import EngineWork
    from moiety.tools.machine import Machine

    machine = Machine.here()
    work = EngineWork(
        asked["model"],
        asked["groups"],
        asked["concurrency"],
        asked["prompt"],
        asked["new"],
        asked["dtype"],
        asked["rounds"],
    )
    rows = run_async(measure(work, progress=progress()))
    for line in (*lines(rows, work), *machine.lines(), f"again:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, {"machine": asdict(machine), "rows": [asdict(row) for row in rows]})
