"""`moiety bench split`: compares an engine that computes its experts itself with one whose experts are in services."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from moiety.bench.checkpoints import model_name
from moiety.bench.engines.engine_runner import BenchModel, EngineRunner, EngineWork, no_waits
from moiety.bench.engines.layer_times import LayerTime, SpanRecorder, layer_times
from moiety.bench.local_experts import LocalExperts
from moiety.bench.report import percentile, table
from moiety.bench.token_speeds import Speeds, median
from moiety.compose.router import build_engine
from moiety.core.experts import ExpertSet
from moiety.local.cluster import LocalCluster
from moiety.model.experts.read import load_experts
from moiety_kernels.threads import usable_cores

TRACED_TOKENS = 16

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SplitRow:
    """Results at one concurrency. Speeds are medians of the rounds.

    `compute_ms`, `hop_ms` and `imbalance` are medians over the layers of decode steps, from a traced run after the rounds.
    `one_process_compute_ms` is the median over the layers of all steps of the last round.
    """

    model: str
    concurrency: int
    one_process_itl_p50_ms: float
    split_itl_p50_ms: float
    itl_ratio: float
    one_process_decode_tokens_per_s: float
    split_decode_tokens_per_s: float
    one_process_compute_ms: float  # of one layer's experts
    compute_ms: float  # of one layer's slowest group
    hop_ms: float  # of one layer: from the first call sent to the last answer, less `compute_ms`
    imbalance: float  # the slowest group's compute over the mean of all groups


async def bench_split(work: EngineWork, *, progress: Progress = lambda _: None) -> tuple[SplitRow, ...]:
    """Measures both engines in turns, at each concurrency of `work`.

    Raises CheckpointError where the checkpoint cannot be served, ConfigError where it does not suit the workload.
    """
    async with AsyncExitStack() as stack:
        opened = await BenchModel.open(work, stack, progress)
        shape, cores = opened.layout.shape, usable_cores()

        progress("one process: loading router and experts")
        held = ExpertSet.uniform(shape.moe_layers, range(shape.experts))
        weights = await asyncio.to_thread(load_experts, opened.checkpoint, opened.layout, held, opened.dtype)
        local, recorder = LocalExperts(shape.mlp, weights), SpanRecorder()
        settings = opened.settings(work)
        model, cache = await opened.load(settings)
        one_process = EngineRunner(
            build_engine([local], None, settings, model, cache, no_waits, recorder), shape, stack
        )

        progress(f"split: starting {work.groups} expert groups")
        threads = max(1, cores // work.groups)
        cluster = LocalCluster(opened.path, groups=work.groups, dtype=work.dtype, threads=threads, pin=True)
        await stack.enter_async_context(cluster)
        split = await opened.engine_over(cluster, settings, recorder, stack)
        stack.callback(progress, "stop: ending the processes")

        rows = []
        for count in work.concurrency:
            progress(f"measure: {count} streams, {work.rounds} rounds")
            rows.append(await asyncio.to_thread(_measure, work, count, one_process, split, local, recorder))
        return tuple(rows)


def split_lines(rows: Sequence[SplitRow], work: EngineWork) -> Iterator[str]:
    """Yields the lines of the report: a table with one line per concurrency, then its legend."""
    header = ("streams", "one process", "split", "ratio", "compute, one process", "compute", "hop", "imbalance")
    yield rows[0].model
    yield from table(
        header,
        [
            (
                str(row.concurrency),
                f"{row.one_process_itl_p50_ms:.2f}",
                f"{row.split_itl_p50_ms:.2f}",
                f"{row.itl_ratio:.3f}",
                f"{row.one_process_compute_ms:.3f}",
                f"{row.compute_ms:.3f}",
                f"{row.hop_ms:.3f}",
                f"{row.imbalance:.2f}",
            )
            for row in rows
        ],
    )
    yield (
        "one process, split = ITL p50 of the same engine in ms, ratio = split over one process; the rest: medians of decode "
        "layers, times in ms"
    )
    yield "compute = the experts' time (the slowest group's), hop = first call sent to last answer, less compute"
    yield "imbalance = the slowest group's compute over the mean"
    yield (
        f"{work.dtype}, {work.groups} groups, prompts of {work.prompt_tokens}, {work.new_tokens} new tokens, "
        f"{work.rounds} rounds in turns"
    )


def _measure(
    work: EngineWork,
    streams: int,
    one_process: EngineRunner,
    split: EngineRunner,
    local: LocalExperts,
    recorder: SpanRecorder,
) -> SplitRow:
    runs: dict[EngineRunner, list[Speeds]] = {one_process: [], split: []}
    for runner in runs:
        runner.run(streams, work.prompt_tokens, 2)
    for _ in range(work.rounds):
        for runner, results in runs.items():
            local.compute_s.clear()
            results.append(runner.run(streams, work.prompt_tokens, work.new_tokens))
            if runner is one_process:
                compute_s = percentile(local.compute_s, 50)
    recorder.spans.clear()
    split.run(streams, work.prompt_tokens, min(TRACED_TOKENS, work.new_tokens), recorder)
    layers = layer_times(recorder.spans, work.groups)
    one_process_speeds, split_speeds = median(runs[one_process]), median(runs[split])
    return SplitRow(
        model=model_name(work.model),
        concurrency=streams,
        one_process_itl_p50_ms=one_process_speeds.itl_p50_ms,
        split_itl_p50_ms=split_speeds.itl_p50_ms,
        itl_ratio=split_speeds.itl_p50_ms / one_process_speeds.itl_p50_ms,
        one_process_decode_tokens_per_s=one_process_speeds.decode_tokens_per_s,
        split_decode_tokens_per_s=split_speeds.decode_tokens_per_s,
        one_process_compute_ms=1000 * compute_s,
        compute_ms=_median_of(layers, "compute_ms"),
        hop_ms=_median_of(layers, "hop_ms"),
        imbalance=_median_of(layers, "imbalance"),
    )


def _median_of(layers: Sequence[LayerTime], name: str) -> float:
    return percentile([getattr(layer, name) for layer in layers], 50)
