"""Servers and streams start and stop cleanly, and a lost peer is noticed."""

from __future__ import annotations

import asyncio
import socket

import pytest

from moiety.core.experts import ExpertSet
from moiety.errors import ConfigError, MoietyError, PeerLost
from moiety.internal.v1.experts_pb2 import ForwardRequest
from moiety.registry.memory import MemoryRegistry
from moiety.testing import HOST, Caller, FakeExperts, eventually, fake_shape, open_caller
from moiety.wire.rows import RowBuffer
from moiety.wire.server import Server
from moiety.wire.transports.connection import Reply
from moiety.wire.transports.expert_link import ExpertLink
from moiety.wire.transports.mailbox import Mailbox

SHAPE = fake_shape()


async def test_a_port_in_use_is_a_wrong_setting():
    """The error names the port and the host, besides gRPC's own message."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server([], [])
        with pytest.raises(ConfigError, match=f"setting port = {port}: cannot listen on {HOST}"):
            await server.start(HOST, port)
        await server.stop(0)


async def test_a_server_may_be_stopped_from_two_sides_at_once():
    """Overlapping and repeated stops act as one; grpc.aio alone would crash the process."""
    replica = FakeExperts("a", ExpertSet.uniform(2, [0]), SHAPE, on_call=lambda _: asyncio.Event().wait())
    await replica.start(MemoryRegistry())
    async with open_caller(replica.replica.address) as caller:
        lost = ask(caller, 1)
        await eventually(lambda: bool(replica.calls))
        await asyncio.gather(*(replica.vanish() for _ in range(5)))
        await replica.vanish()
        assert isinstance(await lost, PeerLost)


def ask(caller: Caller, call_id: int) -> asyncio.Future[Reply | PeerLost]:
    """Sends one row for expert 0; returns the future of its answer."""
    request = ForwardRequest(
        call_id=call_id, rows=1, k_offsets=bytes([0] * 4 + [1] + [0] * 3), experts=bytes(4), dtype="float32"
    )
    row_bytes = 4 * SHAPE.mlp.hidden
    return caller.send(request, RowBuffer.within(memoryview(bytes(row_bytes)), row_bytes))


async def test_an_address_without_a_replica_fails_soon():
    """Opening a link to a port that never answers raises one of our errors within the time limit."""
    with socket.socket() as silent:
        silent.bind((HOST, 0))
        silent.listen()  # accepts, but never sends a byte
        async with asyncio.timeout(5):
            with pytest.raises(MoietyError):
                await ExpertLink.open(f"{HOST}:{silent.getsockname()[1]}", 0.2, Mailbox())
