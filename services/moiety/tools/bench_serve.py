"""`moiety bench serve`: the whole served system beside plain transformers, in turns, on one checkpoint."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moiety.client import Client
from moiety.core import ModelShape
from moiety.errors import ConfigError
from moiety.local import LocalCluster
from moiety.model.checkpoint import Checkpoint
from moiety.model.layout import expert_layout
from moiety.model.tiny import write_tiny
from moiety.tools.bench_plain import PlainTransformers
from moiety.tools.bench_report import table, usable_cores
from moiety.tools.bench_tokens import Speeds, median, speeds
from moiety.wire.codec import torch_dtype

# 90 M parameters, 75 M of them in experts: big enough for a step to be work, small enough for a laptop.
SYNTHETIC: Mapping[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "initializer_range": 0.02,
}
SYNTHETIC_NAME = "synthetic qwen3_moe"
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of both systems."""

    groups: int
    concurrency: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int  # at least 2
    dtype: str
    rounds: int


@dataclass(frozen=True, slots=True)
class ServeRow:
    """One system at one concurrency: medians of the rounds."""

    model: str
    concurrency: int
    system: str
    decode_tokens_per_s: float
    itl_p50_ms: float
    itl_p99_ms: float
    ttft_p50_ms: float
    prefill_tokens_per_s: float
    ratio: float  # decode tokens/s over plain transformers' at this concurrency


@dataclass(frozen=True, slots=True)
class ServeReport:
    """All rows, and what was compared."""

    workload: Workload
    threads: int
    rows: tuple[ServeRow, ...]


async def bench_serve(
    checkpoint: str | None, workload: Workload, *, progress: Callable[[str], None] = lambda _: None
) -> ServeReport:
    """Measures; None is a synthetic checkpoint in a temporary folder.

    Raises CheckpointError or ConfigError where the checkpoint cannot be served, or not with such prompts.
    """
    async with AsyncExitStack() as stack:
        name = Path(checkpoint).name if checkpoint is not None else SYNTHETIC_NAME
        if checkpoint is None:
            checkpoint = stack.enter_context(TemporaryDirectory(prefix="moiety-bench-"))
            progress(f"model: writing a {name}")
            await asyncio.to_thread(_write_synthetic, checkpoint, workload)
        shape = (await asyncio.to_thread(expert_layout, Checkpoint.open(checkpoint))).shape
        if workload.prompt_tokens + workload.new_tokens > shape.max_context:
            told = f"{workload.prompt_tokens} + {workload.new_tokens}"
            raise ConfigError("prompt + new", told, f"at most {shape.max_context}, the model's context")
        # As many threads as the services can keep busy at once, but no more than there are cores.
        threads = min(workload.groups, usable_cores())
        dtype = torch_dtype(workload.dtype, shape.dtype)
        progress(f"plain: loading {name} with transformers, {threads} threads")
        plain = await asyncio.to_thread(PlainTransformers, checkpoint, dtype, threads)
        progress(f"served: starting gateway, router and {workload.groups} expert groups, a thread each")
        cluster = await stack.enter_async_context(
            LocalCluster(
                checkpoint,
                groups=workload.groups,
                dtype=workload.dtype,
                router={"slots": max(workload.concurrency), "queue_limit": max(workload.concurrency)},
            )
        )
        stack.callback(progress, "stop: ending the processes")
        client = await stack.enter_async_context(Client(cluster.address))
        systems: dict[str, _Served | _Plain] = {
            "moiety": _Served(client),
            f"transformers {plain.implementation}": _Plain(plain),
        }
        return ServeReport(workload, threads, await _rows(name, systems, shape, workload, progress))


def serve_lines(report: ServeReport) -> Iterator[str]:
    """The result for people."""
    header = ("concurrency", "system", "decode tok/s", "ITL p50", "ITL p99", "TTFT p50", "prefill tok/s", "ratio")
    yield from table(
        header,
        [
            (
                str(row.concurrency),
                row.system,
                f"{row.decode_tokens_per_s:.1f}",
                f"{row.itl_p50_ms:.1f}",
                f"{row.itl_p99_ms:.1f}",
                f"{row.ttft_p50_ms:.1f}",
                f"{row.prefill_tokens_per_s:.0f}",
                f"{row.ratio:.2f}",
            )
            for row in report.rows
        ],
    )
    asked, model = report.workload, report.rows[0].model
    yield (
        f"{model}, {asked.dtype}, prompts of {asked.prompt_tokens}, {asked.new_tokens} new tokens; times in ms; "
        f"ratio = decode tokens/s over transformers'; medians of {asked.rounds} rounds"
    )
    yield f"served by {asked.groups} expert groups, a thread each service; transformers with {report.threads} threads"


class _Served:
    """Streams from the gateway, all at once."""

    def __init__(self, client: Client):
        self._client = client

    async def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[list[float]]]:
        began = time.perf_counter()
        return began, list(await asyncio.gather(*(self._stream(prompt, new_tokens) for prompt in prompts)))

    async def _stream(self, prompt: Sequence[int], new_tokens: int) -> list[float]:
        times: list[float] = []
        async for chunk in self._client.generate(prompt, max_tokens=new_tokens, ignore_eos=True):
            times += [time.perf_counter()] * len(chunk.token_ids)
        return times


class _Plain:
    """One batch, while the cluster is idle."""

    def __init__(self, plain: PlainTransformers):
        self._plain = plain

    async def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[list[float]]]:
        return await asyncio.to_thread(self._plain.generate, prompts, new_tokens)


async def _rows(
    model: str,
    systems: dict[str, _Served | _Plain],
    shape: ModelShape,
    workload: Workload,
    progress: Callable[[str], None],
) -> tuple[ServeRow, ...]:
    measured: dict[tuple[int, str], list[Speeds]] = {}
    for turn in range(workload.rounds):
        for streams in workload.concurrency:
            prompts = _prompts(shape.vocabulary, streams, workload.prompt_tokens, seed=turn)
            for system, runner in systems.items():
                if turn == 0:
                    progress(f"warm up: {system}, {streams} streams")
                    await runner.run(prompts, min(WARM_UP_TOKENS, workload.new_tokens))
                progress(f"round {turn + 1} of {workload.rounds}: {system}, {streams} streams")
                began, arrivals = await runner.run(prompts, workload.new_tokens)
                measured.setdefault((streams, system), []).append(speeds(began, arrivals, workload.prompt_tokens))
    medians = {key: median(runs) for key, runs in measured.items()}
    baseline = list(systems)[-1]
    return tuple(
        ServeRow(
            model=model,
            concurrency=streams,
            system=system,
            **asdict(medians[streams, system]),
            ratio=medians[streams, system].decode_tokens_per_s / medians[streams, baseline].decode_tokens_per_s,
        )
        for streams in workload.concurrency
        for system in systems
    )


def _prompts(vocabulary: int, count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=generator).tolist()


def _write_synthetic(folder: str, workload: Workload) -> None:
    context = max(2048, workload.prompt_tokens + workload.new_tokens)
    stored = "bfloat16" if workload.dtype == "auto" else workload.dtype
    write_tiny("qwen3_moe", folder, **SYNTHETIC, max_position_embeddings=context, dtype=stored)
