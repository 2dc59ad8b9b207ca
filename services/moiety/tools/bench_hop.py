"""`moiety bench hop`: what a call to an expert replica costs beyond the experts' own time.

As in a router, a thread that computes sends on an ExpertStream, and the answer wakes it. The replica is a real one, of a
tiny model with wide rows. A unary gRPC echo of the same bytes runs in turns with it, as the baseline.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from moiety.errors import MoietyError
from moiety.local import LocalCluster
from moiety.model.tiny import write_tiny
from moiety.tools.bench_echo import Echo, echo_process
from moiety.tools.bench_report import percentile, table
from moiety.wire import codec
from moiety.wire.expert_stream import ExpertStream, Reply
from moiety.wire.experts_pb2 import OUTCOME_OK, ForwardRequest, Outcome

HIDDEN = 2048
ROW_KIB = HIDDEN * 2 // 1024  # bfloat16
# One thin layer: 256 rows (1 MiB) take its expert well under a millisecond.
_MODEL: Mapping[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "dtype": "bfloat16",
}
WARM_UP = 20
ANSWER_S = 10.0
_MS = 1000.0


@dataclass(frozen=True, slots=True)
class HopRow:
    """One payload size. `call` is send to answer, `expert` queue and compute as the reply tells, `hop` the rest."""

    payload_kib: int
    calls: int
    call_p50_ms: float
    expert_p50_ms: float
    hop_p50_ms: float
    hop_p99_ms: float
    echo_p50_ms: float
    echo_p99_ms: float
    ratio: float  # hop p50 / echo p50


async def bench_hop(
    *,
    payload_kib: Sequence[int],
    calls: int,
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[HopRow, ...]:
    """One row per size, each a multiple of ROW_KIB, from `calls` calls in each of `rounds` rounds."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="moiety-bench-"))
        progress(f"model: writing a qwen3_moe with rows of {ROW_KIB} KiB")
        await asyncio.to_thread(write_tiny, "qwen3_moe", folder, **_MODEL)
        progress("start: an expert replica, and an echo process beside it")
        cluster = await stack.enter_async_context(LocalCluster(folder, groups=1))
        echo = await stack.enter_async_context(echo_process())
        stack.callback(progress, "stop: ending the processes")
        stream = await ExpertStream.open(cluster.experts(0)[0].replica.address, ANSWER_S)
        stack.push_async_callback(stream.close)
        caller = _Caller(stream)
        rows = []
        for size in payload_kib:
            progress(f"measure: {size} KiB, {rounds} rounds of {calls} calls each way")
            rows.append(await _measure(caller, echo, size, calls, rounds))
        return tuple(rows)


def hop_lines(rows: Sequence[HopRow]) -> Iterator[str]:
    """The result for people."""
    header = ("KiB", "call p50", "expert p50", "hop p50", "hop p99", "echo p50", "echo p99", "hop/echo")
    yield from table(
        header,
        [
            (
                str(row.payload_kib),
                f"{row.call_p50_ms:.3f}",
                f"{row.expert_p50_ms:.3f}",
                f"{row.hop_p50_ms:.3f}",
                f"{row.hop_p99_ms:.3f}",
                f"{row.echo_p50_ms:.3f}",
                f"{row.echo_p99_ms:.3f}",
                f"{row.ratio:.2f}",
            )
            for row in rows
        ],
    )
    yield "milliseconds; call = send to answer, hop = call - expert (queue and compute), echo = unary gRPC, same bytes"


class _Caller:
    """Makes calls as a router's engine thread does: one at a time, woken through a queue."""

    def __init__(self, stream: ExpertStream):
        self._stream = stream
        self._answers: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._count = 0

    def run(self, payload: codec.Rows, calls: int) -> list[tuple[float, float]]:
        """(call, expert) milliseconds of `calls` calls. Raises what went wrong with one."""
        return [self._once(payload) for _ in range(calls)]

    def _once(self, payload: codec.Rows) -> tuple[float, float]:
        self._count += 1
        rows = len(payload)
        header = ForwardRequest(
            call_id=self._count,
            revision=self._stream.description.revision,
            rows=rows,
            k_offsets=codec.int32_bytes(np.arange(rows + 1)),
            experts=codec.int32_bytes(np.zeros(rows)),
            dtype=self._stream.description.dtype,
        )
        began = time.perf_counter()
        self._stream.send(header, payload, self._answers.put)
        answer = self._answers.get(timeout=ANSWER_S)
        took_ms = (time.perf_counter() - began) * _MS
        if not isinstance(answer, Reply):
            raise answer if isinstance(answer, MoietyError) else TypeError(f"not an answer: {answer!r}")
        reply = answer.header
        if reply.outcome != OUTCOME_OK or len(answer.payload) != payload.nbytes:
            raise MoietyError(f"the replica answered {Outcome.Name(reply.outcome)}: {reply.detail}")
        return took_ms, reply.queue_ms + reply.compute_ms


async def _measure(caller: _Caller, echo: Echo, size_kib: int, calls: int, rounds: int) -> HopRow:
    payload = codec.rows_of(torch.randn(size_kib // ROW_KIB, HIDDEN).to(torch.bfloat16))
    frame = payload.tobytes()
    await asyncio.to_thread(caller.run, payload, WARM_UP)
    await _echo_times(echo, frame, WARM_UP)
    samples: list[tuple[float, float]] = []
    echoes: list[float] = []
    for _ in range(rounds):
        samples += await asyncio.to_thread(caller.run, payload, calls)
        echoes += await _echo_times(echo, frame, calls)
    hops = [call - expert for call, expert in samples]
    hop_p50, echo_p50 = percentile(hops, 50), percentile(echoes, 50)
    return HopRow(
        payload_kib=size_kib,
        calls=len(samples),
        call_p50_ms=percentile([call for call, _ in samples], 50),
        expert_p50_ms=percentile([expert for _, expert in samples], 50),
        hop_p50_ms=hop_p50,
        hop_p99_ms=percentile(hops, 99),
        echo_p50_ms=echo_p50,
        echo_p99_ms=percentile(echoes, 99),
        ratio=hop_p50 / echo_p50,
    )


async def _echo_times(echo: Echo, frame: bytes, calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        await echo(frame)
        times.append((time.perf_counter() - began) * _MS)
    return times
