"""Errors, cancelled requests and lost peers on one stream: no call disturbs another."""

from __future__ import annotations

import asyncio

import pytest
from event_stream_support import Router, calling, event, request, serving, tokens

from moiety.errors import DeadlineExceeded, InvalidRequest, MoietyError, PeerLost, ResourceExhausted
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.testing import HOST, eventually
from moiety.wire import status
from moiety.wire.channels import channel
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_client import MOST_MISSED, CallClient, StreamBroken
from moiety.wire.event_stream.call_server import SendEvent


@pytest.mark.parametrize(
    "error", [ResourceExhausted("the queue is full", 0.25), InvalidRequest("n", 0, "at least 1"), MoietyError("broken")]
)
async def test_an_error_ends_its_own_call_alone(error: MoietyError):
    """An error arrives as it was raised, including its retry delay, and a concurrent call goes on."""
    go_on = asyncio.Event()

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        send_event(lambda: event(1))
        if call.request.request_id == "bad":
            raise error
        await go_on.wait()
        send_event(lambda: event(2, last=True))

    async with calling(handle) as (router, client):
        good = asyncio.create_task(tokens(client, "good"))
        await eventually(lambda: bool(router.seen))
        with pytest.raises(type(error), match=str(error)) as raised:
            await tokens(client, "bad")
        if isinstance(error, ResourceExhausted):
            assert isinstance(raised.value, ResourceExhausted)
            assert raised.value.retry_after_s == 0.25
        go_on.set()
        assert await good == [1, 2]


async def test_an_unexpected_error_hides_its_message(caplog: pytest.LogCaptureFixture):
    """An unexpected exception is logged once, under the request id; the gateway gets only this id."""

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        raise KeyError("secret")

    async with calling(handle) as (_, client):
        with pytest.raises(MoietyError, match=r"^internal error; the service's log has it under request id mine$"):
            await tokens(client, "mine")
        (logged,) = caplog.records
        assert "request mine failed" in logged.message
        assert "secret" in caplog.text


async def test_leaving_a_request_cancels_it_at_its_router():
    """Closing the iterator of a request cancels its call, and no other; the stream goes on."""
    cancelled: list[str] = []

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        send_event(lambda: event(1))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(call.request.request_id)
            raise

    async with calling(handle) as (router, client):
        stays = client.generate(request("stays"), Deadline(), "")
        leaves = client.generate(request("leaves"), Deadline(), "")
        assert [*(await anext(stays)).token_ids, *(await anext(leaves)).token_ids] == [1, 1]
        await leaves.aclose()
        await eventually(lambda: cancelled == ["leaves"])
        assert not router.streams[0].idle
        await stays.aclose()
        await eventually(lambda: cancelled == ["leaves", "stays"] and router.streams[0].idle)


async def test_a_lost_router_fails_open_requests_and_serves_the_next():
    """Every request of a broken stream gets PeerLost at once; the next request opens a new stream."""

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        send_event(lambda: event(1, last=call.request.request_id == "short"))
        if call.request.request_id != "short":
            await asyncio.Event().wait()

    async with serving(handle) as (router, address):
        port = int(address.rpartition(":")[2])
        async with channel(address) as link:
            client = CallClient(engine_pb2_grpc.EngineServiceStub(link), "the router")
            running = [asyncio.create_task(tokens(client, f"long-{number}")) for number in range(4)]
            await eventually(lambda: len(router.seen) == 4)
            await router.server.stop(0)
            for result in await asyncio.gather(*running, return_exceptions=True):
                assert isinstance(result, PeerLost)
                assert "the stream to the router broke" in str(result)
            again = Router(handle)
            await again.server.start(HOST, port)

            async def answered() -> list[int]:
                while True:
                    try:
                        return await tokens(client, "short")
                    except PeerLost:
                        await asyncio.sleep(0.05)  # the channel has not noticed yet

            assert await answered() == [1]
            await client.close()
            await again.server.stop(0)


async def test_a_lost_gateway_ends_its_calls():
    """Cancelling the stream cancels every call on it, so that their slots become free."""
    running: set[int] = set()

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        running.add(call.call_id)
        try:
            await asyncio.Event().wait()
        finally:
            running.discard(call.call_id)

    async with serving(handle) as (_, address), channel(address) as link:
        stream = engine_pb2_grpc.EngineServiceStub(link).GenerateTokens()
        for number in range(4):
            await stream.write(engine_pb2.GenerateTokensRequest(call_id=number, request=request(str(number))))
        await eventually(lambda: len(running) == 4)
        stream.cancel()
        await eventually(lambda: not running)


def test_every_error_keeps_its_kind_in_a_message():
    """An error that travels as a message keeps its type and text, which includes the retry delay."""
    for error in (ResourceExhausted("full", 1.5), DeadlineExceeded("late"), PeerLost("gone"), MoietyError("broken")):
        received = status.error_of_message(status.to_message(error))
        assert type(received) is type(error)
        assert str(received) == str(error)


async def test_a_silent_stream_is_broken_though_its_connection_lives(monkeypatch: pytest.MonkeyPatch):
    """A call that waits long stays open while its router sends beats; a stream without beats fails its calls."""
    monkeypatch.setattr("moiety.wire.event_stream.call_server.BEAT_S", 0.02)
    monkeypatch.setattr("moiety.wire.event_stream.call_client.BEAT_S", 0.05)
    finish = asyncio.Event()

    async def handle(_: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        await finish.wait()
        send_event(lambda: event(1, last=True))

    async with calling(handle) as (router, client):
        waiting = asyncio.create_task(tokens(client))
        await asyncio.sleep(0.05 * 2 * MOST_MISSED)
        assert not waiting.done()
        finish.set()
        assert await waiting == [1]
        finish.clear()
        monkeypatch.setattr("moiety.wire.event_stream.call_server.BEAT_S", 60.0)
        with pytest.raises(StreamBroken, match=r"silent for 0\.3 s"):
            await tokens(client)
        assert len(router.streams) == 1
        finish.set()
        assert await tokens(client) == [1]
