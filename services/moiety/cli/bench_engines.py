"""`moiety bench split` and `moiety bench lanes`: engines that are asked directly."""

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
    service_environment,
    write_json,
)
from moiety.cli.run import progress, run_async

if TYPE_CHECKING:
    from moiety.tools.engine_runner import EngineWork


def _engine_options(concurrency: str) -> Callable[[Function], Function]:
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


@click.command()
@_engine_options(concurrency="1,8,32")
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
    from moiety.tools.bench_split import bench_split, split_lines

    _ask_engines(context, json_file, bench_split, split_lines, asked)


@click.command()
@_engine_options(concurrency="1,2,4,8,16,32,64")
@click.pass_context
def lanes(context: click.Context, /, json_file: Path | None, **asked: Any) -> None:
    """Measure lanes: a step's batch in one piece, in two parts that take turns, and in what the router finds faster.

    While one lane waits for its experts the other computes, but each streams the weights it needs again. By default a
    router tries both ways for each size of step and keeps the better; this shows what each way gives on this machine.

    \b
    Example:
      moiety bench lanes --concurrency 8,64
    """
    service_environment()
    from moiety.tools.bench_lanes import bench_lanes, lanes_lines

    _ask_engines(context, json_file, bench_lanes, lanes_lines, asked)


def _ask_engines(
    context: click.Context,
    json_file: Path | None,
    measure: Callable[..., Coroutine[Any, Any, tuple[Any, ...]]],
    lines: Callable[[Sequence[Any], EngineWork], Iterator[str]],
    asked: Mapping[str, Any],
) -> None:
    from moiety.tools.engine_runner import EngineWork
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
