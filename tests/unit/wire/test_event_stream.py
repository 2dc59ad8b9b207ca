"""Many requests on one stream: the events of a step share a message, and each request gets its own events only."""

from __future__ import annotations

import asyncio

import pytest
from event_stream_support import calling, event, request, serving, tokens

from moiety.errors import DeadlineExceeded
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.testing import eventually
from moiety.wire.channels import channel
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_server import SendEvent

CALLS = 32


async def test_a_steps_events_come_in_one_message():
    """The events that one step emits for many requests are sent in one message, each with its call's id."""
    sends: list[SendEvent] = []

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        sends.append(send_event)
        await asyncio.Event().wait()

    def step() -> None:
        for number, send_event in enumerate(sends):
            send_event(lambda number=number: event(number))

    async with serving(handle) as (_, address), channel(address) as link:
        stream = engine_pb2_grpc.EngineServiceStub(link).GenerateTokens()
        for number in range(CALLS):
            await stream.write(engine_pb2.GenerateTokensRequest(call_id=100 + number, request=request(str(number))))
        await eventually(lambda: len(sends) == CALLS)
        for _step in range(3):
            step()  # on the loop itself: nothing can be written before all events are emitted
            message = await stream.read()
            assert [(got.call_id, *got.token_ids) for got in message.events] == [(100 + n, n) for n in range(CALLS)]
        stream.cancel()


async def test_a_request_gets_its_own_events_only():
    """Concurrent requests each get their own events in order, also when other threads emit them."""

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        base = int(call.request.request_id) * 1000

        def steps() -> None:
            for token in range(20):
                send_event(lambda token=token: event(base + token, last=token == 19))

        await asyncio.to_thread(steps)

    async with calling(handle) as (router, client):
        answers = await asyncio.gather(*(tokens(client, str(number)) for number in range(CALLS)))
        assert answers == [[number * 1000 + token for token in range(20)] for number in range(CALLS)]
        assert len(router.streams) == 1
        assert router.streams[0].idle


async def test_all_choices_end_before_a_request_does():
    """A request for two choices ends with the last of them, and is not cancelled afterwards."""

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        send_event(lambda: event(1, last=True))
        await asyncio.sleep(0)
        send_event(lambda: event(2, last=True))

    async with calling(handle) as (router, client):
        assert await tokens(client, choices=2) == [1, 2]
        assert await tokens(client, choices=2) == [1, 2]
        assert len(router.seen) == 2


async def test_deadlines_and_traces_travel_with_the_call(monkeypatch: pytest.MonkeyPatch):
    """A call carries its time left and its trace context; a router that does not answer in time is not waited for."""
    monkeypatch.setattr("moiety.wire.event_stream.call_client.LATE_S", 0.1)

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        await asyncio.Event().wait()

    async with calling(handle) as (router, client):
        with pytest.raises(DeadlineExceeded, match="the router did not answer by the deadline"):
            await tokens(client, left_s=0.2)
        (call,) = router.seen
        assert 0 < call.timeout_ms <= 200
        stream = client.generate(request("traced"), Deadline(), "00-trace-span-01")
        waiting = asyncio.ensure_future(anext(stream))
        await eventually(lambda: len(router.seen) == 2)
        assert router.seen[1].traceparent == "00-trace-span-01"
        assert router.seen[1].timeout_ms == 0
        waiting.cancel()


async def test_a_client_that_closes_its_half_is_answered():
    """Calls that arrived before the gateway closed its half are answered to their end."""

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        await asyncio.sleep(0.05)
        send_event(lambda: event(7, last=True))

    async with serving(handle) as (_, address), channel(address) as link:
        stream = engine_pb2_grpc.EngineServiceStub(link).GenerateTokens()
        await stream.write(engine_pb2.GenerateTokensRequest(call_id=1, request=request("a")))
        await stream.done_writing()
        found = [got.token_ids[0] async for message in stream for got in message.events]
        assert found == [7]


async def test_a_deadline_far_away_is_no_error():
    """A deadline beyond the largest timeout_ms is sent as the largest timeout_ms."""

    async def handle(call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        send_event(lambda: event(3, last=True))

    async with calling(handle) as (router, client):
        assert await tokens(client, left_s=1e9) == [3]
        assert router.seen[0].timeout_ms == (1 << 32) - 1
