"""What a gateway makes of the link to a router: it outranks the registry, and says when requests must move."""

from __future__ import annotations

import asyncio

import pytest
from gateway_support import SHAPE, Gateway, expected, gateway_over, tokens

from moiety.core.replica import ReplicaState
from moiety.core.system import SystemId
from moiety.errors import Unavailable
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.internal.v1 import engine_pb2
from moiety.testing import SYSTEM, FakeEngine, eventually, fake_system
from moiety.testing.common import no_wait


def _generated(request: engine_pb2.EngineRequest) -> int:
    return len(request.generated_ids)


def engine(name: str, system: SystemId = SYSTEM) -> FakeEngine:
    """Returns a router."""
    return FakeEngine(name, SHAPE, system=system)


async def test_a_reset_connection_costs_a_router_no_request(tokenizer: Tokenizer):
    """A request whose stream broke while its router lives resumes, on the same router too, behind the tokens it has."""
    only = engine("a")
    async with gateway_over(tokenizer, only) as gateway:

        async def break_once(position: int) -> None:
            if position == 3 and len(only.requests) == 1:
                await eventually(lambda: gateway.received == 3)
                only.break_streams()
                await asyncio.Event().wait()

        only.before_token = break_once
        assert await tokens(gateway) == expected(6)
    assert [_generated(request) for request in only.requests] == [0, 3]


async def test_the_requests_of_a_broken_stream_ask_its_router_once(tokenizer: Tokenizer):
    """Each of many requests resumes on the router that lives, which is asked once whether it does, not once for each."""
    only, asked = FakeEngine("a", SHAPE, places=64, slots=64), 0
    async with gateway_over(tokenizer, only, max_concurrent=64) as gateway:

        async def hold(position: int) -> None:
            if position == 3 and len(only.requests) <= 40:
                await asyncio.Event().wait()

        async def count(_: int) -> None:
            nonlocal asked
            asked += 1

        only.before_token = hold
        running = [asyncio.create_task(tokens(gateway)) for _ in range(40)]
        await eventually(lambda: gateway.received == 3 * 40)
        only.before_describe = count
        only.break_streams()
        assert [await task for task in running] == [expected(6)] * 40
        assert asked <= 1 + 4, "one question, and a few regular polls"


async def test_a_request_that_ends_every_router_is_given_up(tokenizer: Tokenizer):
    """A request that breaks stream after stream before its first token ends with UNAVAILABLE, not with every router."""
    only = engine("a")
    async with gateway_over(tokenizer, only) as gateway:

        async def break_always(_position: int) -> None:
            only.break_streams()
            await asyncio.Event().wait()

        only.before_token = break_always
        with pytest.raises(Unavailable, match="5 routers in a row were lost with this request"):
            await tokens(gateway)
    assert len(only.requests) == 5


async def test_a_router_that_answers_stays_in_use_though_it_is_not_listed(tokenizer: Tokenizer):
    """A live link outranks the registry: a router whose entry expired serves on for as long as it answers."""
    router = engine("a")
    async with gateway_over(tokenizer, router, router_wait_s=0.3) as gateway:
        assert await tokens(gateway) == expected(6)
        await gateway.registry.deregister("a")
        await eventually(lambda: not gateway.watch.replicas)
        for _ in range(3):
            assert await tokens(gateway) == expected(6)
            await asyncio.sleep(0.3)  # a poll, which the router answers


async def test_a_router_that_says_that_it_drains_gets_nothing_new(tokenizer: Tokenizer):
    """A planned leave is known by the link, though the registry still lists the router as ready."""
    leaving, staying = engine("a"), engine("b")
    async with gateway_over(tokenizer, leaving, staying) as gateway:
        for _ in range(4):
            await tokens(gateway)
        leaving.state = ReplicaState.DRAINING
        await asyncio.sleep(0.6)  # two polls
        before = len(leaving.requests)
        for _ in range(4):
            assert await tokens(gateway) == expected(6)
        assert len(leaving.requests) == before


async def test_a_router_whose_link_is_dead_leaves_at_once(tokenizer: Tokenizer):
    """A lost router that the registry still lists gets no request; all go to the other one."""
    lost, other = engine("a"), engine("b")
    async with gateway_over(tokenizer, lost, other) as gateway:
        assert await tokens(gateway) == expected(6)
        await lost.vanish()
        for _ in range(8):
            assert await tokens(gateway) == expected(6)
        assert len(other.requests) >= 8


async def test_the_requests_of_a_sick_router_move(tokenizer: Tokenizer):
    """A router that says that it is sick keeps no stream while another is ready, and gets none; alone, it is still used."""
    routers, released = [engine("a"), engine("b")], asyncio.Event()
    async with gateway_over(tokenizer, *routers) as gateway:

        async def hold(position: int) -> None:
            if position == 3:
                await released.wait()

        for router in routers:
            router.before_token = hold
        running = asyncio.create_task(tokens(gateway))
        await eventually(lambda: gateway.received == 3)
        sick, well = sorted(routers, key=lambda router: -len(router.requests))
        sick.state = ReplicaState.SICK
        await eventually(lambda: len(well.requests) == 1)
        assert list(well.requests[0].generated_ids) == expected(3)
        assert sick.cancelled == 1
        released.set()
        assert await running == expected(6)
        for _ in range(4):
            assert await tokens(gateway) == expected(6)
        assert len(sick.requests) == 1
        await well.vanish()
        assert await tokens(gateway) == expected(6)
        assert len(sick.requests) == 2


async def test_the_requests_of_a_router_that_answers_no_poll_move(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """A router whose connection lives but whose service hangs loses its streams to one that answers."""
    monkeypatch.setattr("moiety.gateway.routers.router_peer.HANDSHAKE_S", 0.2)
    monkeypatch.setattr("moiety.gateway.routers.router_peer.SILENT_S", 0.5)
    routers = engine("a"), engine("b")
    async with gateway_over(tokenizer, *routers) as gateway:
        running, hung, well = await stuck_request(gateway, *routers)
        hung.before_describe = lambda _: asyncio.Event().wait()  # type: ignore[assignment,return-value]
        assert await running == expected(6)
        assert list(well.requests[0].generated_ids) == expected(3)


async def test_the_requests_of_a_router_whose_connection_ended_move(tokenizer: Tokenizer):
    """gRPC may forget a stream whose connection has ended. The poll that finds no router breaks the stream, within 2 s."""
    routers = engine("a"), engine("b")

    async def lost(_: int) -> None:
        raise Unavailable("Stream removed (ping timeout)")

    async with gateway_over(tokenizer, *routers) as gateway:
        running, hung, well = await stuck_request(gateway, *routers)
        hung.before_describe = lost
        async with asyncio.timeout(2.0):
            assert await running == expected(6)
        assert list(well.requests[0].generated_ids) == expected(3)


async def stuck_request(
    gateway: Gateway, *routers: FakeEngine
) -> tuple[asyncio.Task[list[int]], FakeEngine, FakeEngine]:
    """Starts a request whose router stops after three tokens. Returns the request, that router, and one that goes on."""

    async def stop(position: int) -> None:
        if position == 3:
            await asyncio.Event().wait()

    for router in routers:
        router.before_token = stop
    running = asyncio.create_task(tokens(gateway))
    await eventually(lambda: gateway.received == 3)
    stopped, well = sorted(routers, key=lambda router: -len(router.requests))
    well.before_token = no_wait
    return running, stopped, well


async def test_without_a_router_of_our_own_the_error_says_which_are_not_used(tokenizer: Tokenizer):
    """Where only a router of another system is listed, a request ends after router_wait_s and names that router."""
    async with gateway_over(tokenizer, engine("b", fake_system(app="other")), router_wait_s=0.3) as gateway:
        with pytest.raises(
            Unavailable, match=r"no router is ready; waited 0.3 s .*; router b is not used: its app is other"
        ):
            await tokens(gateway)
