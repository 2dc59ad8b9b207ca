"""A router cancels a call: it leaves the replica's queue, unless the device has begun it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch
from expert_support import SHAPE, MakeRuntime, rows_for

from moiety.core.experts import ExpertSet
from moiety.core.replica import Transport
from moiety.expert.runtime import Runtime
from moiety.expert.service import ExpertService
from moiety.internal.v1 import experts_pb2
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, SYSTEM, Caller, eventually, open_caller
from moiety.wire import codec
from moiety.wire.rows import RowBuffer
from moiety.wire.server import Server
from moiety.wire.service_names import EXPERT_SERVICE
from moiety.wire.transports.connection import Reply
from moiety.wire.transports.shm_listener import SharedMemoryListener
from moiety_kernels import grouped_expert_mlp

pytestmark = pytest.mark.parametrize("transport", [Transport.GRPC, Transport.SHM])


@asynccontextmanager
async def served(runtime: Runtime) -> AsyncIterator[str]:
    """The service over `runtime` on every transport; yields its address."""
    service = ExpertService(runtime, SHAPE, "tiny", SYSTEM, torch.float32, NO_TRACER, lambda: "cpu, float32")
    server = Server([service.handler()], [EXPERT_SERVICE])
    listener = SharedMemoryListener(str(SYSTEM), service.dtype, service.row_bytes, runtime.mailbox, service.accept)
    service.shared_memory = listener.name
    address = f"{HOST}:{await server.start(HOST, 0)}"
    try:
        async with asyncio.timeout(20):
            yield address
    finally:
        await listener.close()
        await server.stop(0)


def send(caller: Caller, call_id: int, layer: int = 0) -> asyncio.Future:
    """Sends one row for expert 0."""
    header = experts_pb2.ForwardRequest(
        call_id=call_id,
        system_key=SYSTEM.key,
        layer=layer,
        rows=1,
        k_offsets=codec.int32_bytes(np.arange(2)),
        experts=codec.int32_bytes(np.zeros(1, dtype=np.int64)),
        dtype="float32",
    )
    return caller.send(header, RowBuffer.of(rows_for(1)))


async def test_only_the_waiting_call_of_that_connection_is_cancelled(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch, transport: Transport
):
    """The call is answered with CANCELLED and never computed; equal ids of another router and begun calls are not touched."""
    begun, free = threading.Event(), threading.Event()

    def compute_when_free(*arguments: object, **options: object) -> torch.Tensor:
        begun.set()
        assert free.wait(10)
        return grouped_expert_mlp(*arguments, **options)

    monkeypatch.setattr("moiety.expert.device.grouped_expert_mlp", compute_when_free)
    runtime = make_runtime(ExpertSet.uniform(3, range(4)))
    async with served(runtime) as address, open_caller(address, transport) as one, open_caller(address) as other:
        assert one.link.description.kind == "cpu, float32"
        first = send(one, 1)
        assert await asyncio.to_thread(begun.wait, 10)
        waiting, foreign = send(one, 2, layer=1), send(other, 2, layer=1)
        for call_id in (2, 1, 9):  # waits, has begun, was never sent
            await one.cancel(call_id, 0)
        if transport is Transport.GRPC:  # shared memory is read by the device's thread
            await waiting
        free.set()
        answers = await asyncio.gather(first, waiting, foreign)
        assert all(isinstance(answer, Reply) for answer in answers)
        outcomes = [answer.header.outcome for answer in answers]
        assert outcomes == [experts_pb2.OUTCOME_OK, experts_pb2.OUTCOME_CANCELLED, experts_pb2.OUTCOME_OK]
        assert [answer.header.batch_rows for answer in answers] == [1, 0, 1]
        assert (await send(one, 3)).header.outcome == experts_pb2.OUTCOME_OK
        await eventually(lambda: runtime.idle)
