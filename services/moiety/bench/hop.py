"""`moiety bench hop`: what a call to an expert replica costs beyond the experts' own time.

As in a router, one thread sends a call on a connection and waits for the answer, which the transport puts into the thread's
mailbox. The replica is real; it serves a tiny model with wide rows. The baseline is a unary gRPC echo of the same bytes.
Transports and baseline are measured in turns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moiety.bench.echo import Echo, echo_process
from moiety.bench.report import percentile, table
from moiety.config.run_folder import scratch_folder
from moiety.core.replica import Transport
from moiety.core.system import SystemId
from moiety.errors import MoietyError, PeerLost, Unavailable
from moiety.internal.v1.experts_pb2 import OUTCOME_OK, ForwardRequest, Outcome
from moiety.local.cluster import LocalCluster
from moiety.synthetic import write_tiny
from moiety.wire import codec
from moiety.wire.rows import RowBuffer, copy_rows
from moiety.wire.transports.connection import Reply
from moiety.wire.transports.expert_link import ExpertLink
from moiety.wire.transports.mailbox import Mailbox

HIDDEN = 2048
ROW_KIB = HIDDEN * 2 // 1024  # bfloat16
# One thin layer: its expert computes 256 rows (1 MiB) in well under a millisecond.
_MODEL: Mapping[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "dtype": "bfloat16",
}
WARM_UP = 20  # calls before the measured ones
TRANSPORTS = (Transport.SHM, Transport.GRPC)
ANSWER_S = 10.0
_MS = 1000.0


@dataclass(frozen=True, slots=True)
class HopRow:
    """Results for one payload size over one transport.

    `call` is the time from send to answer. `expert` is the sum of the queue and compute times in the reply. `hop` is
    `call` - `expert`.
    """

    transport: str
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
    """Returns one row per payload size and transport. A row is measured with `rounds` rounds of `calls` calls.

    Payload sizes must be multiples of ROW_KIB.
    """
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        progress(f"model: writing a qwen3_moe with rows of {ROW_KIB} KiB")
        await asyncio.to_thread(write_tiny, "qwen3_moe", folder, **_MODEL)
        progress("start: an expert replica, and an echo process beside it")
        cluster = await stack.enter_async_context(LocalCluster(folder, groups=1))
        echo = await stack.enter_async_context(echo_process())
        stack.callback(progress, "stop: ending the processes")
        address = cluster.experts(0)[0].replica.address
        callers = []
        for transport in TRANSPORTS:
            mailbox = Mailbox()
            link = await ExpertLink.open(address, ANSWER_S, mailbox, transport)
            stack.callback(mailbox.drain)
            stack.push_async_callback(link.close)
            callers.append(_Caller(link, mailbox))
        rows: list[HopRow] = []
        for size in payload_kib:
            progress(f"measure: {size} KiB, {rounds} rounds of {calls} calls each way")
            rows += await _measure(callers, echo, size, calls, rounds)
        return tuple(rows)


def hop_lines(rows: Sequence[HopRow]) -> Iterator[str]:
    """Yields the lines of the report: a table with one line per payload size and transport, then its legend."""
    header = ("KiB", "transport", "call p50", "expert p50", "hop p50", "hop p99", "echo p50", "echo p99", "hop/echo")
    yield from table(
        header,
        [
            (
                str(row.payload_kib),
                row.transport,
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
    """Makes calls one at a time, as a router's engine thread does."""

    def __init__(self, link: ExpertLink, mailbox: Mailbox):
        self.transport = link.transport
        self._link, self._mailbox = link, mailbox
        self._count = 0

    def run(self, payload: RowBuffer, calls: int) -> list[tuple[float, float]]:
        """Returns (call, expert) of HopRow for each of `calls` calls, in milliseconds. Raises the error of a failed call."""
        return [self._once(payload) for _ in range(calls)]

    def _once(self, payload: RowBuffer) -> tuple[float, float]:
        self._count += 1
        rows = len(payload)
        description = self._link.description
        header = ForwardRequest(
            call_id=self._count,
            system_key=SystemId.parse(description.system).key,
            rows=rows,
            k_offsets=codec.int32_bytes(np.arange(rows + 1)),
            experts=codec.int32_bytes(np.zeros(rows)),
            dtype=description.dtype,
        )
        answers: list[Reply | PeerLost] = []
        into = RowBuffer.empty(rows, payload.row_bytes)

        def answered(answer: Reply | PeerLost) -> None:
            if isinstance(answer, Reply) and len(answer.payload) == payload.nbytes:
                copy_rows(RowBuffer.within(answer.payload, payload.row_bytes), into)
            answers.append(answer)

        began = time.perf_counter()
        buffer = self._link.connection.acquire(header, rows=rows, row_bytes=payload.row_bytes, reply_rows=rows)
        copy_rows(payload, buffer.rows)
        buffer.send(answered)
        while not answers:
            self._mailbox.wait(ANSWER_S)
            if time.perf_counter() - began > ANSWER_S:
                raise Unavailable(f"no answer within {ANSWER_S:g} s")
        took_ms = (time.perf_counter() - began) * _MS
        answer = answers[0]
        if isinstance(answer, PeerLost):
            raise answer
        reply = answer.header
        if reply.outcome != OUTCOME_OK or reply.rows != rows:
            raise MoietyError(f"the replica answered {Outcome.Name(reply.outcome)}: {reply.detail}")
        return took_ms, reply.queue_ms + reply.compute_ms


async def _measure(callers: Sequence[_Caller], echo: Echo, size_kib: int, calls: int, rounds: int) -> list[HopRow]:
    payload = RowBuffer.of(torch.randn(size_kib // ROW_KIB, HIDDEN).to(torch.bfloat16))
    frame = payload.host.tobytes()
    for caller in callers:
        await asyncio.to_thread(caller.run, payload, WARM_UP)
    await _echo_times(echo, frame, WARM_UP)
    samples: dict[Transport, list[tuple[float, float]]] = {caller.transport: [] for caller in callers}
    echoes: list[float] = []
    for _ in range(rounds):
        for caller in callers:
            samples[caller.transport] += await asyncio.to_thread(caller.run, payload, calls)
        echoes += await _echo_times(echo, frame, calls)
    return [_row(transport, size_kib, calls_ms, echoes) for transport, calls_ms in samples.items()]


def _row(transport: Transport, size_kib: int, samples: list[tuple[float, float]], echoes: list[float]) -> HopRow:
    hops = [call - expert for call, expert in samples]
    hop_p50, echo_p50 = percentile(hops, 50), percentile(echoes, 50)
    return HopRow(
        transport=transport.value,
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
