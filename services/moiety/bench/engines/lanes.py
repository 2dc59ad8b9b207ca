"""`moiety bench lanes`: compares steps in one piece, steps in two lanes, and the engine's own choice of the two."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from moiety.bench.checkpoints import model_name
from moiety.bench.engines.engine_runner import BenchModel, EngineRunner, EngineWork
from moiety.bench.report import table
from moiety.bench.token_speeds import Speeds, median
from moiety.local.cluster import LocalCluster
from moiety.telemetry.tracing import NO_TRACER
from moiety_kernels.threads import usable_cores

# Setting `lanes` of each engine; 0 = the engine measures both ways and keeps the faster one.
ENGINES = {"one piece": 1, "two lanes": 2, "measured": 0}


@dataclass(frozen=True, slots=True)
class LanesRow:
    """Decode tokens/s at one concurrency, as medians of the rounds."""

    model: str
    concurrency: int
    one_piece_tokens_per_s: float
    two_lanes_tokens_per_s: float
    measured_tokens_per_s: float
    two_lanes_ratio: float  # to the tokens/s in one piece
    measured_ratio: float  # to the tokens/s in one piece


async def bench_lanes(work: EngineWork, *, progress: Callable[[str], None] = lambda _: None) -> tuple[LanesRow, ...]:
    """Measures the engines of ENGINES in turns, at each concurrency of `work`.

    Raises CheckpointError where the checkpoint cannot be served, ConfigError where it does not suit the workload.
    """
    async with AsyncExitStack() as stack:
        opened = await BenchModel.open(work, stack, progress)
        progress(f"experts: starting {work.groups} groups")
        threads = max(1, usable_cores() // work.groups)
        cluster = LocalCluster(opened.path, groups=work.groups, dtype=work.dtype, threads=threads, pin=True)
        await stack.enter_async_context(cluster)
        engines: dict[str, EngineRunner] = {}
        for name, lanes in ENGINES.items():
            progress(f"{name}: loading a router")
            engines[name] = await opened.engine_over(cluster, opened.settings(work, lanes=lanes), NO_TRACER, stack)
        stack.callback(progress, "stop: ending the processes")
        rows = []
        for count in work.concurrency:
            progress(f"measure: {count} streams, {work.rounds} rounds")
            rows.append(await asyncio.to_thread(_measure, work, count, engines))
        return tuple(rows)


def lanes_lines(rows: Sequence[LanesRow], work: EngineWork) -> Iterator[str]:
    """Yields the lines of the report: a table with one line per concurrency, then its legend."""
    yield rows[0].model
    header = ("streams", "one piece tok/s", "two lanes tok/s", "measured tok/s", "two lanes ratio", "measured ratio")
    yield from table(
        header,
        [
            (
                str(row.concurrency),
                f"{row.one_piece_tokens_per_s:.1f}",
                f"{row.two_lanes_tokens_per_s:.1f}",
                f"{row.measured_tokens_per_s:.1f}",
                f"{row.two_lanes_ratio:.3f}",
                f"{row.measured_ratio:.3f}",
            )
            for row in rows
        ],
    )
    yield "ratio = decode tokens/s over decode tokens/s in one piece; measured = the default: lanes where they measured faster"
    yield (
        f"{work.dtype}, {work.groups} groups, prompts of {work.prompt_tokens}, {work.new_tokens} new tokens, "
        f"{work.rounds} rounds in turns"
    )


def _measure(work: EngineWork, streams: int, engines: dict[str, EngineRunner]) -> LanesRow:
    runs: dict[str, list[Speeds]] = {name: [] for name in engines}
    for runner in engines.values():
        runner.run(streams, work.prompt_tokens, min(16, work.new_tokens))  # warm-up, and the engine's first trials
    for _ in range(work.rounds):
        for name, runner in engines.items():
            runs[name].append(runner.run(streams, work.prompt_tokens, work.new_tokens))
    one, two, measured = (median(runs[name]).decode_tokens_per_s for name in ENGINES)
    return LanesRow(model_name(work.model), streams, one, two, measured, two / one, measured / one)
