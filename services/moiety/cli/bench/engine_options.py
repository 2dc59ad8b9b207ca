"""What `moiety bench split` and `moiety bench lanes` share: their options, how they run, and how they print."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moiety.cli.bench.model_check import check_model
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
    from moiety.bench.engines.engine_runner import EngineWork


def engine_options(concurrency: str) -> Callable[[Function], Function]:
    """Returns a decorator that adds the options of a benchmark that calls engines directly.

    `concurrency` is the default of --concurrency.
    """

    def decorate(function: Function) -> Function:
        model_help = "Synthetic model small or large (see bench serve), or a checkpoint folder."
        tokens = click.IntRange(1, 1 << 20)
        for option in (
            json_option,
            rounds_option,
            dtype_option("bfloat16"),
            click.option(
                "--new",
                "new_tokens",
                type=click.IntRange(3, 1 << 20),
                default=64,
                help="Tokens to generate per stream.",
            ),
            click.option("--prompt", "prompt_tokens", type=tokens, default=64, help="Tokens per prompt."),
            click.option(
                "--concurrency",
                type=IntegerList(1, 1024),
                default=concurrency,
                help="Streams at once; several values separated by commas.",
            ),
            groups_option,
            click.option("--model", default="large", help=model_help),
        ):
            function = option(function)
        return function

    return decorate


def prepare(options: Mapping[str, Any]) -> None:
    """Prepares this process for the benchmark's imports, and first checks the command's `options`. Raises as `check_first`."""
    service_environment()
    check_model(options)


def run_engine_benchmark(
    context: click.Context,
    json_file: Path | None,
    measure: Callable[..., Coroutine[Any, Any, tuple[Any, ...]]],
    lines: Callable[[Sequence[Any], EngineWork], Iterator[str]],
    options: Mapping[str, Any],
) -> None:
    """Runs a benchmark with the command's `options`, prints its report, and writes its results to `json_file`, if given.

    `measure` returns the results for an EngineWork, one per concurrency. `lines` yields the lines of the report on them.
    """
    from moiety.bench.engines.engine_runner import EngineWork
    from moiety.tools.machine import Machine

    machine = Machine.here()
    work = EngineWork(**options)
    rows = run_async(measure(work, progress=progress()))
    for line in (*lines(rows, work), *machine.lines(), f"rerun:   {invocation(context)}"):
        click.echo(line)
    write_json(json_file, {"machine": asdict(machine), "rows": [asdict(row) for row in rows]})
