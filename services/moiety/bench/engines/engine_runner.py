"""Runs an engine directly, without gateway or tokenising, on a checkpoint that the benchmark opens."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moiety.bench.checkpoints import model_folder
from moiety.bench.engines.layer_times import SpanRecorder
from moiety.bench.token_speeds import Speeds, speeds
from moiety.compose.router import build_engine, hops_of, reach_experts
from moiety.compose.router_model import load_model
from moiety.config.run_folder import scratch_folder
from moiety.config.services import RouterSettings
from moiety.config.validate import validated
from moiety.core.experts import ModelShape
from moiety.core.sampling import Sampling
from moiety.errors import ConfigError, Unavailable
from moiety.local.cluster import LocalCluster
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import revision_of
from moiety.model.experts.cached import expert_layout
from moiety.model.experts.layout import ExpertLayout
from moiety.router.cache.kv_cache import KVCache
from moiety.router.engine import Engine
from moiety.router.hop.context import HopContext
from moiety.router.sequence.sequence import Emitted, Sequence
from moiety.telemetry.tracing import NO_SPAN, Tracer
from moiety.wire.codec import torch_dtype

ANSWER_S = 120.0  # longest wait for the next token
COVERED_S = 30.0  # longest wait until every expert has a holder
STOP_S = 5.0  # longest wait for the engine to stop


@dataclass(frozen=True, slots=True)
class EngineWork:
    """The workload that every engine of a benchmark gets."""

    model: str  # a name of checkpoints.SYNTHETIC, or a checkpoint folder
    groups: int
    concurrency: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    dtype: str
    rounds: int


@dataclass(frozen=True, slots=True)
class BenchModel:
    """The checkpoint of an EngineWork, opened, with its layout, revision and dtype."""

    path: Path
    checkpoint: Checkpoint
    layout: ExpertLayout
    revision: str
    dtype: torch.dtype

    @classmethod
    async def open(cls, work: EngineWork, stack: AsyncExitStack, progress: Callable[[str], None]) -> BenchModel:
        """Opens the checkpoint; writes a synthetic one first, to a folder that `stack` removes.

        Raises ConfigError where prompt and new tokens together exceed the model's context.
        """
        folder = stack.enter_context(scratch_folder())
        context = work.prompt_tokens + work.new_tokens
        path = await asyncio.to_thread(model_folder, work.model, folder, work.dtype, context, progress)
        checkpoint = Checkpoint.open(path)
        layout = await asyncio.to_thread(expert_layout, checkpoint)
        if context > layout.shape.max_context:
            tokens = f"{work.prompt_tokens} + {work.new_tokens}"
            raise ConfigError("prompt + new", tokens, f"at most {layout.shape.max_context}, the model's context")
        revision = await asyncio.to_thread(revision_of, checkpoint)
        return cls(path, checkpoint, layout, revision, torch_dtype(work.dtype, layout.shape.dtype))

    def settings(self, work: EngineWork, **more: Any) -> RouterSettings:
        """Returns a router's settings, with a slot per stream of the highest concurrency. Settings in `more` win."""
        streams = max(work.concurrency)
        values = {"model": str(self.path), "dtype": work.dtype, "slots": streams, "queue_limit": streams}
        return validated(RouterSettings, {**values, **more})

    async def load(self, settings: RouterSettings) -> tuple[torch.nn.Module, KVCache]:
        """Loads the trunk and creates its KV cache."""
        return await asyncio.to_thread(load_model, settings, self.checkpoint, self.layout, self.dtype, self.revision)

    async def engine_over(
        self, cluster: LocalCluster, settings: RouterSettings, tracer: Tracer, stack: AsyncExitStack
    ) -> EngineRunner:
        """Builds an engine in this process on `cluster`'s experts. Returns its runner once every expert has a holder."""
        shape = self.layout.shape
        model, cache = await self.load(settings)
        hop, lanes = await reach_experts(settings, shape, cluster.system, self.dtype, cluster.registry, tracer, stack)
        await _covered(hop)
        return EngineRunner(
            build_engine(hops_of(settings, hop), lanes, settings, model, cache, no_waits, tracer), shape, stack
        )


class EngineRunner:
    """Runs an engine without gateway or tokenising. The engine is idle between runs."""

    def __init__(self, engine: Engine, shape: ModelShape, stack: AsyncExitStack):
        self._engine, self._shape, self._count = engine, shape, 0
        engine.start()
        stack.push_async_callback(asyncio.to_thread, engine.stop, STOP_S)

    def run(self, streams: int, prompt_tokens: int, new_tokens: int, recorder: SpanRecorder | None = None) -> Speeds:
        """Runs `streams` prompts at once and blocks until all are done. Raises the error of the first that fails."""
        arrived: queue.SimpleQueue[tuple[int, float, Emitted]] = queue.SimpleQueue()
        began = time.perf_counter()

        def emit_to(stream: int) -> Callable[[Emitted], None]:
            return lambda emitted: arrived.put((stream, time.perf_counter(), emitted))

        for stream in range(streams):
            self._count += 1
            generator = torch.Generator().manual_seed(self._count)
            prompt = torch.randint(3, self._shape.vocabulary, (prompt_tokens,), generator=generator).tolist()
            self._engine.submit(
                Sequence(
                    request_id=f"bench-{self._count}",
                    tokens=prompt,
                    prompt_tokens=prompt_tokens,
                    sampling=Sampling(max_tokens=new_tokens, ignore_eos=True),
                    stop_ids=frozenset(),
                    emit=emit_to(stream),
                    span=recorder.root() if recorder is not None else NO_SPAN,
                )
            )
        times: list[list[float]] = [[] for _ in range(streams)]
        running = streams
        while running:
            try:
                stream, now, emitted = arrived.get(timeout=ANSWER_S)
            except queue.Empty:
                raise Unavailable(f"no token within {ANSWER_S:.0f} s") from None
            if emitted.error is not None:
                raise emitted.error
            times[stream] += [now] * len(emitted.token_ids)
            running -= emitted.finish is not None
        return speeds(began, times, prompt_tokens)


async def _covered(hop: HopContext) -> None:
    """Waits until every expert has a holder. Raises Unavailable after COVERED_S."""
    try:
        async with asyncio.timeout(COVERED_S):
            while hop.fleet.table.uncovered():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise Unavailable(f"not every expert had a holder within {COVERED_S:.0f} s") from None


def no_waits(_layer: int, _experts: list[int]) -> None:
    """Does nothing. An engine calls it when no replica holds some experts; a benchmark has no autoscaler to tell."""
