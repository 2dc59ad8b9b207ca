"""Many requests on one stream: events that are there together come together, and no call disturbs another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from math import inf
from typing import Any

import grpc
import pytest

from moiety.errors import DeadlineExceeded, InvalidRequest, MoietyError, PeerLost, ResourceExhausted
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.testing import HOST, eventually
from moiety.v1 import generation_pb2
from moiety.wire import status
from moiety.wire.channels import Server, channel
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream import CallClient, CallServer, Handle, Tell

CALLS = 32


class Router(engine_pb2_grpc.EngineServiceServicer):
    """Answers each call with `handle`, and can be lost."""

    def __init__(self, handle: Handle):
        self._handle = handle
        self.streams: list[CallServer] = []
        self.seen: list[engine_pb2.GenerateTokensRequest] = []
        self.server = Server([], ["moiety.internal.v1.EngineService"])
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, self.server.grpc)

    async def GenerateTokens(
        self, calls: AsyncIterator[engine_pb2.GenerateTokensRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        self.streams.append(CallServer(self._answer))
        await self.streams[-1].serve(calls, context)

    async def _answer(self, call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        self.seen.append(call)
        await self._handle(call, tell)


def serve(handle: Handle, scenario: Callable[[Router, str], Awaitable[None]]) -> None:
    """`scenario` with a router that listens."""

    async def main() -> None:
        router = Router(handle)
        address = f"{HOST}:{await router.server.start(HOST, 0)}"
        try:
            await scenario(router, address)
        finally:
            await router.server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 20))


def calling(handle: Handle, scenario: Callable[[Router, CallClient], Awaitable[None]]) -> None:
    """`scenario` with a gateway's end of one stream to a router."""

    async def main(router: Router, address: str) -> None:
        async with channel(address) as link:
            client = CallClient(engine_pb2_grpc.EngineServiceStub(link), "the router")
            await scenario(router, client)
            await client.close()

    serve(handle, main)


def event(token: int, *, last: bool = False) -> engine_pb2.EngineEvent:
    """One token, and whether it is the choice's last."""
    reason = generation_pb2.FINISH_REASON_LENGTH if last else generation_pb2.FINISH_REASON_UNSPECIFIED
    return engine_pb2.EngineEvent(token_ids=[token], finish_reason=reason)


def request(name: str, choices: int = 1) -> engine_pb2.EngineRequest:
    """One that a test can tell by its name."""
    return engine_pb2.EngineRequest(request_id=name, sampling=generation_pb2.SamplingParams(n=choices))


async def tokens(client: CallClient, name: str = "a", *, left_s: float = inf, choices: int = 1) -> list[int]:
    """Those of one request, to its end."""
    deadline = Deadline() if left_s == inf else Deadline.after(left_s)
    found: list[int] = []
    async for got in client.generate(request(name, choices), deadline, ""):
        found += got.token_ids
    return found


def test_a_steps_events_come_in_one_message():
    """Told at once by another thread, the events of all requests leave in one message, each to its own request."""
    tells: list[Tell] = []

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        tells.append(tell)
        await asyncio.Event().wait()

    def step() -> None:
        for number, tell in enumerate(tells):
            tell(lambda number=number: event(number))

    async def scenario(_: Router, address: str) -> None:
        async with channel(address) as link:
            stream = engine_pb2_grpc.EngineServiceStub(link).GenerateTokens()
            for number in range(CALLS):
                await stream.write(engine_pb2.GenerateTokensRequest(call_id=100 + number, request=request(str(number))))
            await eventually(lambda: len(tells) == CALLS)
            for _step in range(3):
                step()  # on the loop itself: nothing can be written before all are told
                message = await stream.read()
                assert [(got.call_id, *got.token_ids) for got in message.events] == [(100 + n, n) for n in range(CALLS)]
            stream.cancel()

    serve(handle, scenario)


def test_a_request_hears_its_own_events_only():
    """Requests that run side by side get what was told of them, in order, from whatever thread it was told."""

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        base = int(call.request.request_id) * 1000

        def steps() -> None:
            for token in range(20):
                tell(lambda token=token: event(base + token, last=token == 19))

        await asyncio.to_thread(steps)

    async def scenario(router: Router, client: CallClient) -> None:
        answers = await asyncio.gather(*(tokens(client, str(number)) for number in range(CALLS)))
        assert answers == [[number * 1000 + token for token in range(20)] for number in range(CALLS)]
        assert len(router.streams) == 1
        assert router.streams[0].idle

    calling(handle, scenario)


@pytest.mark.parametrize(
    "error", [ResourceExhausted("the queue is full", 0.25), InvalidRequest("n", 0, "at least 1"), MoietyError("broken")]
)
def test_an_error_ends_its_own_call_alone(error: MoietyError):
    """It arrives as it was raised, the time to come again with it, and a call beside it goes on."""
    go_on = asyncio.Event()

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        tell(lambda: event(1))
        if call.request.request_id == "bad":
            raise error
        await go_on.wait()
        tell(lambda: event(2, last=True))

    async def scenario(router: Router, client: CallClient) -> None:
        good = asyncio.create_task(tokens(client, "good"))
        await eventually(lambda: bool(router.seen))
        with pytest.raises(type(error), match=str(error)) as raised:
            await tokens(client, "bad")
        if isinstance(error, ResourceExhausted):
            assert isinstance(raised.value, ResourceExhausted)
            assert raised.value.retry_after_s == 0.25
        go_on.set()
        assert await good == [1, 2]

    calling(handle, scenario)


def test_a_bug_is_told_without_its_words(caplog: pytest.LogCaptureFixture):
    """An exception that is not ours is logged at the router and named, no more, at the gateway."""

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        raise KeyError("secret")

    async def scenario(_: Router, client: CallClient) -> None:
        with pytest.raises(MoietyError, match=r"^internal error: KeyError$"):
            await tokens(client)
        assert "secret" in caplog.text

    calling(handle, scenario)


def test_a_request_that_is_left_is_given_up_at_its_router():
    """Leaving the events cancels that call, and no other, while the stream goes on."""
    cancelled: list[str] = []

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        tell(lambda: event(1))
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(call.request.request_id)
            raise

    async def scenario(router: Router, client: CallClient) -> None:
        stays = client.generate(request("stays"), Deadline(), "")
        leaves = client.generate(request("leaves"), Deadline(), "")
        assert [*(await anext(stays)).token_ids, *(await anext(leaves)).token_ids] == [1, 1]
        await leaves.aclose()
        await eventually(lambda: cancelled == ["leaves"])
        assert not router.streams[0].idle
        await stays.aclose()
        await eventually(lambda: cancelled == ["leaves", "stays"] and router.streams[0].idle)

    calling(handle, scenario)


def test_all_choices_end_before_a_request_does():
    """A request for two choices ends with the last of them, and is not given up afterwards."""

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        tell(lambda: event(1, last=True))
        await asyncio.sleep(0)
        tell(lambda: event(2, last=True))

    async def scenario(router: Router, client: CallClient) -> None:
        assert await tokens(client, choices=2) == [1, 2]
        assert await tokens(client, choices=2) == [1, 2]
        assert len(router.seen) == 2

    calling(handle, scenario)


def test_a_lost_router_fails_what_runs_and_is_asked_anew():
    """Every request of a broken stream gets PeerLost at once; the next one opens another stream."""

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        tell(lambda: event(1, last=call.request.request_id == "short"))
        if call.request.request_id != "short":
            await asyncio.Event().wait()

    async def scenario(router: Router, address: str) -> None:
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

    serve(handle, scenario)


def test_a_lost_gateway_ends_its_calls():
    """When the stream is cancelled every call on it is, so that slots come free."""
    running: set[int] = set()

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        running.add(call.call_id)
        try:
            await asyncio.Event().wait()
        finally:
            running.discard(call.call_id)

    async def scenario(router: Router, address: str) -> None:
        async with channel(address) as link:
            stream = engine_pb2_grpc.EngineServiceStub(link).GenerateTokens()
            for number in range(4):
                await stream.write(engine_pb2.GenerateTokensRequest(call_id=number, request=request(str(number))))
            await eventually(lambda: len(running) == 4)
            stream.cancel()
            await eventually(lambda: not running)

    serve(handle, scenario)


def test_deadlines_and_traces_travel_with_the_call(monkeypatch: pytest.MonkeyPatch):
    """A router is told how long a call has; one that says nothing then is not waited for."""
    monkeypatch.setattr("moiety.wire.event_stream.LATE_S", 0.1)

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        await asyncio.Event().wait()

    async def scenario(router: Router, client: CallClient) -> None:
        with pytest.raises(DeadlineExceeded, match="the router said nothing at the deadline"):
            await tokens(client, left_s=0.2)
        (call,) = router.seen
        assert 0 < call.timeout_ms <= 200
        stream = client.generate(request("traced"), Deadline(), "00-trace-span-01")
        waiting = asyncio.ensure_future(anext(stream))
        await eventually(lambda: len(router.seen) == 2)
        assert router.seen[1].traceparent == "00-trace-span-01"
        assert router.seen[1].timeout_ms == 0
        waiting.cancel()

    calling(handle, scenario)


def test_a_client_that_closes_its_half_is_answered():
    """Calls that came before the end of a stream's calls are answered to their end."""

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        await asyncio.sleep(0.05)
        tell(lambda: event(7, last=True))

    async def scenario(_: Router, address: str) -> None:
        async with channel(address) as link:
            stream = engine_pb2_grpc.EngineServiceStub(link).GenerateTokens()
            await stream.write(engine_pb2.GenerateTokensRequest(call_id=1, request=request("a")))
            await stream.done_writing()
            found = [got.token_ids[0] async for message in stream for got in message.events]
            assert found == [7]

    serve(handle, scenario)


def test_every_error_keeps_its_kind_in_a_message():
    """What a status would carry, a message carries: kind, words, and when to come again."""
    for error in (ResourceExhausted("full", 1.5), DeadlineExceeded("late"), PeerLost("gone"), MoietyError("broken")):
        told = status.error_of_message(status.to_message(error))
        assert type(told) is type(error)
        assert str(told) == str(error)


def test_a_deadline_far_away_is_no_error():
    """A client may allow more time than the field of a call can tell."""

    async def handle(call: engine_pb2.GenerateTokensRequest, tell: Tell) -> None:
        tell(lambda: event(3, last=True))

    async def scenario(router: Router, client: CallClient) -> None:
        assert await tokens(client, left_s=1e9) == [3]
        assert router.seen[0].timeout_ms == (1 << 32) - 1

    calling(handle, scenario)
