"""What a router's stream may occupy in an expert replica: a router that does not read its replies harms only itself."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import suppress

import grpc
import numpy as np
import pytest
import torch
from expert_support import SHAPE, MakeRuntime, rows_for

from moiety.core.experts import ExpertSet
from moiety.expert import call_stream
from moiety.expert.service import ExpertService
from moiety.internal.v1 import experts_pb2
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, SYSTEM, eventually
from moiety.wire import codec
from moiety.wire.channels import channel
from moiety.wire.rows import RowBuffer
from moiety.wire.server import Server
from moiety.wire.service_names import EXPERT_SERVICE

FORWARD = f"/{EXPERT_SERVICE}/Forward"
ROWS = 4096  # of a call: 256 KiB of rows, and twice that in the reply
REPLY_BYTES = 2 * ROWS * 4 * SHAPE.mlp.hidden


def frame(call_id: int, rows: int = ROWS) -> bytes:
    """Returns a call of `rows` rows, each for two experts of layer 0."""
    header = experts_pb2.ForwardRequest(
        call_id=call_id,
        system_key=SYSTEM.key,
        rows=rows,
        k_offsets=codec.int32_bytes(np.arange(rows + 1) * 2),
        experts=codec.int32_bytes(np.tile([0, 1], rows)),
        dtype="float32",
    )
    return codec.encode(header, RowBuffer.of(rows_for(rows)))


async def test_a_router_that_does_not_read_is_stopped_and_given_up_and_others_are_served(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
):
    """The replica reads no more calls than its window holds, answers another router meanwhile, and then ends the stream."""
    monkeypatch.setattr(call_stream, "WINDOW_BYTES", 8 * REPLY_BYTES)
    monkeypatch.setattr(call_stream, "UNREAD_S", 1.0)
    service = ExpertService(
        make_runtime(ExpertSet.uniform(3, range(4))), SHAPE, "tiny", SYSTEM, torch.float32, NO_TRACER
    )
    accept, read = service.accept, []

    def count(header: experts_pb2.ForwardRequest, *rest: object) -> None:
        read.append(header.call_id)
        accept(header, *rest)

    monkeypatch.setattr(service, "accept", count)
    server = Server([service.handler()], [EXPERT_SERVICE])
    address = f"{HOST}:{await server.start(HOST, 0)}"
    try:
        async with asyncio.timeout(30), channel(address) as first, channel(address) as second:
            deaf, quick = first.stream_stream(FORWARD)(), second.stream_stream(FORWARD)()

            async def push() -> None:
                with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # when the replica ends the stream
                    for call_id in itertools.count(1):
                        await deaf.write(frame(call_id))

            pushing = asyncio.create_task(push())
            answered, until = 0, time.monotonic() + 2.0  # twice UNREAD_S
            while time.monotonic() < until:
                await quick.write(frame(0, rows=1))
                header, payload = codec.decode(experts_pb2.ForwardResponse, await quick.read())
                assert (header.outcome, len(payload)) == (experts_pb2.OUTCOME_OK, 2 * 4 * SHAPE.mlp.hidden)
                answered += 1
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the end, after what gRPC has buffered
                while await deaf.read() is not grpc.aio.EOF:
                    pass
            await asyncio.wait([pushing])
            assert answered > 100
            assert 8 <= sum(map(bool, read)) < 8 + 8, "the window's calls, and those whose replies gRPC buffers"
            await eventually(lambda: service.open_streams == 1)
    finally:
        await server.stop(0)


async def test_a_window_smaller_than_a_call_passes_calls_one_by_one(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
):
    """Every call is answered, and the stream ends when the router has closed its half."""
    monkeypatch.setattr(call_stream, "WINDOW_BYTES", 1)
    service = ExpertService(
        make_runtime(ExpertSet.uniform(3, range(4))), SHAPE, "tiny", SYSTEM, torch.float32, NO_TRACER
    )
    server = Server([service.handler()], [EXPERT_SERVICE])
    address = f"{HOST}:{await server.start(HOST, 0)}"
    try:
        async with asyncio.timeout(20), channel(address) as link:
            call = link.stream_stream(FORWARD)()
            for call_id in range(1, 6):
                await call.write(frame(call_id))
            await call.done_writing()
            replies = [codec.decode(experts_pb2.ForwardResponse, await call.read())[0] for _ in range(5)]
            assert [reply.call_id for reply in replies] == [1, 2, 3, 4, 5]
            assert await call.read() is grpc.aio.EOF
    finally:
        await server.stop(0)
