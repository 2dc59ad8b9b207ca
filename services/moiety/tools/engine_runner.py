"""An engine that a benchmark asks directly, with experts that it starts or holds itself."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import torch

from moiety.core import ModelShape, Sampling
from moiety.errors import Unavailable
from moiety.router.engine import Engine
from moiety.router.hop import Hop
from moiety.router.sequence import Emitted
from moiety.router.sequence import Sequence as Request
from moiety.telemetry.tracing import NO_SPAN
from moiety.tools.bench_tokens import Speeds, speeds
from moiety.tools.layer_times import SpanRecorder

ANSWER_S = 120.0  # a step that takes longer is broken
COVERED_S = 30.0
STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineWork:
    """What every engine of a benchmark is asked."""

    model: str  # as bench_models has it
    groups: int
    concurrency: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    dtype: str
    rounds: int


class EngineRunner:
    """An engine, asked directly: no gateway, no tokenising. Idle between runs."""

    def __init__(self, engine: Engine, shape: ModelShape, stack: AsyncExitStack):
        self._engine, self._shape, self._count = engine, shape, 0
        engine.start()
        stack.push_async_callback(asyncio.to_thread, engine.stop, STOP_S)

    def run(self, streams: int, prompt_tokens: int, new_tokens: int, recorder: SpanRecorder | None = None) -> Speeds:
        """Blocks until all streams are done. Raises what ended one of them early."""
        arrived: queue.SimpleQueue[tuple[int, float, Emitted]] = queue.SimpleQueue()
        began = time.perf_counter()

        def emit_to(stream: int) -> Callable[[Emitted], None]:
            return lambda emitted: arrived.put((stream, time.perf_counter(), emitted))

        for stream in range(streams):
            self._count += 1
            generator = torch.Generator().manual_seed(self._count)
            prompt = torch.randint(3, self._shape.vocabulary, (prompt_tokens,), generator=generator).tolist()
            self._engine.submit(
                Request(
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


async def covered(hop: Hop) -> None:
    """Waits until every expert has a holder."""
    try:
        async with asyncio.timeout(COVERED_S):
            while hop.fleet.table.uncovered():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise Unavailable(f"not every expert had a holder within {COVERED_S:.0f} s") from None


def no_waits(_layer: int, _experts: list[int]) -> None:
    """Nobody scales these groups."""
