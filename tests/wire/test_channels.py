"""Servers and streams: started and stopped without harm, and a lost peer noticed."""

from __future__ import annotations

import asyncio
import socket

import pytest

from moiety.core import ExpertSet
from moiety.errors import ConfigError, MoietyError, PeerLost
from moiety.load.memory import MemoryRegistry
from moiety.testing import HOST, FakeExperts, fake_shape
from moiety.wire import codec
from moiety.wire.channels import Server
from moiety.wire.expert_stream import ExpertStream, Reply
from moiety.wire.experts_pb2 import ForwardRequest
from moiety.wire.frames import ForwardCall

SHAPE = fake_shape()


def test_a_port_in_use_is_a_wrong_setting():
    """The error names the port and the host, instead of gRPC's own words alone."""

    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind((HOST, 0))
            taken.listen()
            port = taken.getsockname()[1]
            server = Server([], [])
            with pytest.raises(ConfigError, match=f"setting port = {port}: cannot listen on {HOST}"):
                await server.start(HOST, port)
            await server.stop(0)

    asyncio.run(scenario())


def test_a_server_may_be_stopped_from_two_sides_at_once():
    """Overlapping and repeated stops are one stop: grpc.aio on its own ends the process there."""

    async def scenario() -> None:
        replica = FakeExperts("a", ExpertSet.block(2, [0]), SHAPE, on_call=lambda _: asyncio.Event().wait())
        await replica.start(MemoryRegistry())
        stream = await ExpertStream.open(replica.replica.address, 5)
        lost = ask(stream, 1)
        await asyncio.gather(*(replica.vanish() for _ in range(5)))
        await replica.vanish()
        assert isinstance(await lost, PeerLost)
        await stream.close()

    asyncio.run(scenario())


def ask(stream: ExpertStream, call_id: int) -> asyncio.Future[Reply | PeerLost]:
    """One row for expert 0, and its answer to come."""
    answer: asyncio.Future[Reply | PeerLost] = asyncio.get_running_loop().create_future()
    request = ForwardRequest(
        call_id=call_id, rows=1, k_offsets=bytes([0] * 4 + [1] + [0] * 3), experts=bytes(4), dtype="float32"
    )
    stream.send(
        request, codec.rows_in(memoryview(bytes(4 * SHAPE.mlp.hidden)), 4 * SHAPE.mlp.hidden), answer.set_result
    )
    return answer


def test_replies_find_their_calls_in_any_order():
    """Many calls share a stream; the last sent is answered first here, and each gets its own answer, once."""

    async def latest_first(call: ForwardCall) -> None:
        await turns[call.call_id].wait()

    turns = [asyncio.Event() for _ in range(8)]

    async def scenario() -> None:
        replica = FakeExperts("a", ExpertSet.block(2, [0]), SHAPE, on_call=latest_first, copies=2)
        await replica.start(MemoryRegistry())
        stream = await ExpertStream.open(replica.replica.address, 5)
        answers = [ask(stream, call_id) for call_id in range(8)]
        for call_id in reversed(range(8)):
            turns[call_id].set()
            assert (await answers[call_id]).header.call_id == call_id
            assert not any(answer.done() for answer in answers[:call_id])
        await stream.close()
        assert isinstance(await ask(stream, 9), PeerLost), "a closed stream answers at once"
        await replica.vanish()

    asyncio.run(scenario())


def test_an_address_without_a_replica_is_told_soon():
    """Opening a stream to a port that never speaks raises an error of ours within the time limit."""

    async def scenario() -> None:
        with socket.socket() as silent:
            silent.bind((HOST, 0))
            silent.listen()  # accepts, and never says a word
            async with asyncio.timeout(5):
                with pytest.raises(MoietyError):
                    await ExpertStream.open(f"{HOST}:{silent.getsockname()[1]}", 0.2)

    asyncio.run(scenario())
