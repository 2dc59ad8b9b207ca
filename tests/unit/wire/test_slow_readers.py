"""Neither end of the stream between gateway and router collects events without bound, and what goes wrong ends one call."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from event_stream_support import calling, event, request, serving, tokens

from moiety.errors import MoietyError, ResourceExhausted
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.testing import eventually
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_server import SendEvent

SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16), ("grpc.use_local_subchannel_pool", 1)]


async def flood(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
    """Sends events for ever to a call named "flood", and two to any other."""
    if call.request.request_id != "flood":
        send_event(lambda: event(1))
        send_event(lambda: event(2, last=True))
        return
    while True:
        for _ in range(100):
            send_event(lambda: event(7))
        await asyncio.sleep(0)


async def read_to_the_end(stream: grpc.aio.StreamStreamCall) -> None:
    """Reads every message. Raises the error that ends the stream."""
    while await stream.read() is not grpc.aio.EOF:
        pass


async def test_a_gateway_that_does_not_read_loses_its_stream(monkeypatch: pytest.MonkeyPatch):
    """Its calls end, nothing is kept for it, and if it reads on it finds the reason; another gateway is served."""
    monkeypatch.setattr("moiety.wire.event_stream.call_server.MOST_UNSENT", 5000)
    monkeypatch.setattr("moiety.wire.event_stream.call_server.STOPPED_S", 0.1)
    async with (
        serving(flood) as (router, address),
        grpc.aio.insecure_channel(address, options=SMALL_WINDOW) as link,
        grpc.aio.insecure_channel(address, options=SMALL_WINDOW) as other,
    ):
        stream = engine_pb2_grpc.EngineServiceStub(link).GenerateTokens()
        await stream.write(engine_pb2.GenerateTokensRequest(call_id=1, request=request("flood")))
        await eventually(lambda: bool(router.seen))
        await eventually(lambda: router.streams[0].idle)
        second = engine_pb2_grpc.EngineServiceStub(other).GenerateTokens()
        await second.write(engine_pb2.GenerateTokensRequest(call_id=1, request=request("a")))
        assert [got.token_ids[0] for got in (await second.read()).events] == [1, 2]
        with pytest.raises(grpc.aio.AioRpcError, match=r"\d+ events wait for this gateway to read"):
            await read_to_the_end(stream)


async def test_a_gateway_that_reads_slowly_keeps_its_stream(monkeypatch: pytest.MonkeyPatch):
    """While it takes messages, more than MOST_UNSENT events may wait for it, and it gets all of them."""
    monkeypatch.setattr("moiety.wire.event_stream.call_client.MOST_UNREAD", 20_000)
    monkeypatch.setattr("moiety.wire.event_stream.call_server.MOST_UNSENT", 1000)

    async def burst(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        for token in range(20_000):
            send_event(lambda token=token: event(token % 100, last=token == 19_999))

    async with calling(burst) as (router, client):
        assert len(await tokens(client)) == 20_000
        await eventually(lambda: router.streams[0].idle)


@pytest.mark.parametrize("bound", ["MOST_UNREAD", "MOST_UNREAD_BY_ALL"])
async def test_a_client_that_takes_no_events_loses_its_request(monkeypatch: pytest.MonkeyPatch, bound: str):
    """Its call is cancelled at the router and its events are dropped, while other requests of the stream go on."""
    monkeypatch.setattr(f"moiety.wire.event_stream.call_client.{bound}", 1000)
    async with calling(flood) as (router, client):
        unread = client.generate(request("flood"), Deadline(), "")
        assert (await anext(unread)).token_ids == [7]
        await eventually(lambda: router.streams[0].idle)
        assert client.open.calls == client.open.choices == 0
        assert client.open.unread <= 1
        assert await tokens(client) == [1, 2]
        with pytest.raises(ResourceExhausted, match=r"the client has not read, and \d+ events wait for it"):
            await anext(unread)
        assert client.open.unread == 0


async def test_what_is_left_of_a_broken_stream_costs_no_request_of_the_next(monkeypatch: pytest.MonkeyPatch):
    """Events that nobody has taken since their stream broke do not count against the requests of the stream that follows."""
    monkeypatch.setattr("moiety.wire.event_stream.call_client.MOST_UNREAD_BY_ALL", 1000)

    async def burst(_call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        for token in range(300):
            send_event(lambda token=token: event(token, last=token == 299))

    async with calling(burst) as (_, client):
        left = [client.generate(request("left"), Deadline(), "") for _ in range(3)]
        for stream in left:
            await anext(stream)
        await eventually(lambda: client.open.unread == 3 * 299)
        await client.close()
        following = client.generate(request("following"), Deadline(), "")
        await anext(following)
        await eventually(lambda: client.open.calls == 0)
        assert len([got async for got in following]) == 299
        for stream in left:
            await stream.aclose()
        assert client.open.unread == 0


async def test_what_a_client_has_not_read_is_no_work_of_the_router():
    """A call counts as open until the router has ended it, not until the client has read it."""
    async with calling(flood) as (router, client):
        unread = client.generate(request("a"), Deadline(), "")
        assert (await anext(unread)).token_ids == [1]
        await eventually(lambda: client.open.calls == 0)
        assert (client.open.choices, client.open.unread) == (0, 1)
        assert [event.token_ids[0] async for event in unread] == [2]
        assert client.open.unread == 0
        assert len(router.seen) == 1  # not cancelled


async def test_an_event_that_cannot_be_made_ends_its_call_alone():
    """That call gets INTERNAL without the text of the error, and the stream's other calls go on."""
    go_on = asyncio.Event()

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        if call.request.request_id == "bad":
            send_event(lambda: event(int("secret")))
            await asyncio.Event().wait()
        await go_on.wait()
        send_event(lambda: event(5, last=True))

    async with calling(handle) as (router, client):
        good = asyncio.create_task(tokens(client, "good"))
        with pytest.raises(MoietyError, match=r"^internal error; the service's log has it under request id \w+$"):
            await tokens(client, "bad")
        go_on.set()
        assert await good == [5]
        await eventually(lambda: router.streams[0].idle)


async def test_a_repeated_call_id_is_refused():
    """The second call of an id gets an error that names it, and the first goes on."""
    go_on = asyncio.Event()

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        await go_on.wait()
        send_event(lambda: event(5, last=True))

    async with serving(handle) as (router, address), grpc.aio.insecure_channel(address) as link:
        stream = engine_pb2_grpc.EngineServiceStub(link).GenerateTokens()
        for _ in range(2):
            await stream.write(engine_pb2.GenerateTokensRequest(call_id=9, request=request("a")))
        (refused,) = (await stream.read()).events
        assert refused.call_id == 9
        assert "call_id = 9: must be an id of no open call of this stream" in refused.error.detail
        go_on.set()
        assert [got.token_ids[0] for got in (await stream.read()).events] == [5]
        await eventually(lambda: router.streams[0].idle)
        stream.cancel()
