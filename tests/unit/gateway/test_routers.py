"""Routers come and go: requests are spread, resume after the tokens that they have, and fail only where they must."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest
from gateway_support import PROMPT, SHAPE, chunks, die_before, expected, gateway_over, tokens

from moiety.core.replica import ReplicaState
from moiety.core.system import SystemId
from moiety.errors import DeadlineExceeded, MoietyError, NoHolder, ResourceExhausted, Unavailable
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.internal.v1 import engine_pb2
from moiety.testing import SYSTEM, FakeEngine, eventually, fake_system
from moiety.wire import status


def _generated(request: engine_pb2.EngineRequest) -> int:
    return len(request.generated_ids)


def engine(name: str, system: SystemId = SYSTEM) -> FakeEngine:
    """Returns a router."""
    return FakeEngine(name, SHAPE, system=system)


@pytest.mark.parametrize("position", [0, 1, 5])  # before anything was sent; after the first token; at the last
async def test_a_lost_router_costs_no_token(tokenizer: Tokenizer, position: int):
    """After a loss the stream resumes on another router: the client gets the same tokens, each once."""
    routers = engine("a"), engine("b")
    async with gateway_over(tokenizer, *routers) as gateway:
        die_before(gateway, position, *routers)
        assert await tokens(gateway) == expected(6)
        lost, resumed = sorted((request for router in routers for request in router.requests), key=_generated)
        assert not lost.generated_ids
        assert list(resumed.generated_ids) == expected(position)
        assert list(resumed.prompt_ids) == PROMPT
        assert resumed.sampling.seed == 0
        assert resumed.system_key == SYSTEM.key


async def test_losing_every_router_waits_for_the_next(tokenizer: Tokenizer):
    """A request whose two routers are lost resumes on the next router that registers."""
    routers = [engine("a"), engine("b")]
    late = engine("c")
    async with gateway_over(tokenizer, *routers) as gateway:
        for router in routers:
            die_before(gateway, 3, router)
        running = asyncio.create_task(tokens(gateway))
        await eventually(lambda: all(router.requests for router in routers))
        await late.start(gateway.registry)
        try:
            assert await running == expected(6)
        finally:
            await late.vanish()


async def test_no_other_router_in_time_is_unavailable(tokenizer: Tokenizer):
    """Without another router in time, a request ends with UNAVAILABLE."""
    only = engine("a")
    async with gateway_over(tokenizer, only, router_wait_s=0.3) as gateway:
        die_before(gateway, 1, only)
        with pytest.raises(Unavailable, match="no router is ready"):
            await tokens(gateway)


@pytest.mark.parametrize("change", [{"app": "other"}, {"cluster": "other"}, {"revision": "f" * 32}, {"groups": 4}])
async def test_a_router_of_another_system_is_never_used(
    tokenizer: Tokenizer, change: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    """A request whose router is lost ends with UNAVAILABLE: another system's router would go on with another model."""
    ours, other = engine("a"), engine("b", fake_system(**change))
    async with gateway_over(tokenizer, ours, other, router_wait_s=0.3) as gateway:
        assert await tokens(gateway) == expected(6)
        die_before(gateway, 3, ours)
        with pytest.raises(Unavailable, match="no router is ready"):
            await tokens(gateway)
        assert not other.requests
    (name,) = change
    refusals = [record.message for record in caplog.records if "router b" in record.message]
    assert len(refusals) == 1
    assert f"its {name} is {change[name]}, ours" in refusals[0]


async def test_a_router_that_took_the_address_of_a_lost_one_is_never_used(tokenizer: Tokenizer):
    """While the registry still lists a lost router, another system's router at its address gets no request."""
    router = engine("a")
    async with gateway_over(tokenizer, router, router_wait_s=0.3) as gateway:
        assert await tokens(gateway) == expected(6)
        router.system = fake_system(revision="f" * 32)
        with pytest.raises(Unavailable, match="no router is ready"):
            await tokens(gateway)
        assert len(router.requests) == 1


async def test_requests_are_spread(tokenizer: Tokenizer):
    """Four requests at once are spread evenly over two routers."""
    routers, released = [engine("a"), engine("b")], asyncio.Event()

    async def hold(_position: int) -> None:
        await released.wait()

    async with gateway_over(tokenizer, *routers) as gateway:
        for router in routers:
            router.before_token = hold
        running = []
        for count in range(1, 5):
            running.append(asyncio.create_task(tokens(gateway)))
            await eventually(lambda count=count: sum(len(router.requests) for router in routers) == count)
        assert [len(router.requests) for router in routers] == [2, 2]
        released.set()
        assert [await task for task in running] == [expected(6)] * 4


@pytest.mark.parametrize("cause", [NoHolder(3, [1], 30.0), MoietyError("the step failed"), DeadlineExceeded("late")])
async def test_a_routers_own_refusal_is_passed_on(tokenizer: Tokenizer, cause: MoietyError):
    """The error of a living router, such as missing experts, goes to the client; the request is not sent to another."""
    routers = engine("a"), engine("b")
    async with gateway_over(tokenizer, *routers) as gateway:

        async def refuse(position: int) -> None:
            if position == 1:
                raise cause

        for router in routers:
            router.before_token = refuse
        with pytest.raises(MoietyError, match=re.escape(str(cause))) as refused:
            await tokens(gateway)
        assert status.code_of(refused.value) is status.code_of(cause)
        assert sum(len(router.requests) for router in routers) == 1


def choosing(*names: str, places: int = 8, slots: int = 4) -> list[FakeEngine]:
    """Returns routers that cache prefixes in blocks of four tokens."""
    return [FakeEngine(name, SHAPE, places=places, slots=slots, blocks=64) for name in names]


LONG = [list(range(start, start + 41)) for start in (10, 60, 110, 160, 210, 260)]


async def test_a_prompt_goes_to_the_router_that_has_its_prefix(tokenizer: Tokenizer):
    """A longer prompt goes to the router that cached its prefix, and the client gets the count of cached tokens."""
    routers = choosing("a", "b", "c")
    async with gateway_over(tokenizer, *routers) as gateway:
        for prompt in LONG:
            assert (await chunks(gateway, prompt, max_tokens=2))[-1].cached_tokens == 0
        assert len([router for router in routers if router.requests]) > 1
        for prompt in LONG:
            last = (await chunks(gateway, [*prompt, 1, 2, 3, 4], max_tokens=2))[-1]
            assert last.cached_tokens == 40
        other = await chunks(gateway, LONG[0], max_tokens=2, tenant="somebody else")
        assert other[-1].cached_tokens == 0


async def test_a_conversation_returns_to_its_router(tokenizer: Tokenizer):
    """A prompt that starts with an earlier prompt and its output goes to the router that generated that output."""
    routers = choosing("a", "b", "c")
    async with gateway_over(tokenizer, *routers) as gateway:
        said = await tokens(gateway, 12)
        for prompt in LONG:
            await chunks(gateway, prompt, max_tokens=1)
        await chunks(gateway, [*PROMPT, *said, 9], max_tokens=1)
        (home,) = [router for router in routers if list(router.requests[0].prompt_ids) == PROMPT]
        assert list(home.requests[-1].prompt_ids) == [*PROMPT, *said, 9]


async def test_a_router_that_evicted_a_prompt_is_still_right(tokenizer: Tokenizer):
    """A wrong estimate changes no token, and the router's answer corrects it."""
    routers = choosing("a", "b")
    async with gateway_over(tokenizer, *routers) as gateway:
        await chunks(gateway, LONG[0], max_tokens=2)
        for router in routers:
            router.empty_cache()
        for cached in (0, 40):
            got = await chunks(gateway, LONG[0], max_tokens=2)
            assert [token for chunk in got for token in chunk.token_ids] == expected(2, LONG[0])
            assert got[-1].cached_tokens == cached


async def test_a_full_router_is_skipped(tokenizer: Tokenizer):
    """A request goes to the next router where one is full, and is refused with a retry delay only when all are full."""
    routers, released = [FakeEngine("a", SHAPE, places=3), FakeEngine("b", SHAPE, places=1)], asyncio.Event()

    async def hold(_position: int) -> None:
        await released.wait()

    async with gateway_over(tokenizer, *routers) as gateway:
        for router in routers:
            router.before_token = hold
        running = []
        for count in range(1, 5):
            running.append(asyncio.create_task(tokens(gateway)))
            await eventually(lambda count=count: sum(len(router.requests) for router in routers) == count)
        assert [len(router.requests) for router in routers] == [3, 1]
        with pytest.raises(ResourceExhausted, match="the queues of all 2 routers are full") as refused:
            await tokens(gateway)
        assert refused.value.retry_after_s >= 0.25
        released.set()
        assert [await task for task in running] == [expected(6)] * 4
        assert await tokens(gateway) == expected(6)


async def test_a_resumed_request_waits_for_a_place(tokenizer: Tokenizer):
    """An accepted request whose router is lost waits for a place at a full router instead of being refused."""
    first, full = engine("a"), FakeEngine("b", SHAPE, places=0)
    async with gateway_over(tokenizer, first, full) as gateway:
        die_before(gateway, 2, first)
        running = asyncio.create_task(tokens(gateway))
        await eventually(lambda: full.refused > 0 and len(first.requests) == 1)
        refused = full.refused
        await eventually(lambda: full.refused > refused)
        full.places = 1
        assert await running == expected(6)
        assert list(full.requests[0].generated_ids) == expected(2)


async def test_a_router_that_drains_gets_nothing_new(tokenizer: Tokenizer):
    """A draining router finishes its streams; new requests go elsewhere, even if it has cached their prompt."""
    routers, released = choosing("a", "b"), asyncio.Event()

    async def hold(position: int) -> None:
        if position:
            await released.wait()

    async with gateway_over(tokenizer, *routers) as gateway:
        for router in routers:
            router.before_token = hold
        running = asyncio.create_task(chunks(gateway, LONG[0], max_tokens=3))
        await eventually(lambda: any(router.requests for router in routers))
        leaving, staying = sorted(routers, key=lambda router: -len(router.requests))
        (entry,) = [replica for replica in await gateway.registry.replicas() if replica.id == leaving.id]
        await gateway.registry.register(replace(entry, state=ReplicaState.DRAINING))
        await eventually(lambda: any(r.state is ReplicaState.DRAINING for r in gateway.watch.replicas))
        later = [asyncio.create_task(chunks(gateway, LONG[0], max_tokens=3)) for _ in range(3)]
        await eventually(lambda: len(staying.requests) == 3)
        released.set()
        for task in (running, *later):
            assert [token for chunk in await task for token in chunk.token_ids] == expected(3, LONG[0])
        assert len(leaving.requests) == 1


async def test_a_router_that_is_full_with_our_own_requests_is_not_asked(tokenizer: Tokenizer):
    """A router gets at most slots + queue limit of our requests; the gateway refuses the next with a retry delay."""
    router, released = FakeEngine("a", SHAPE, slots=2, queue=1), asyncio.Event()

    async def hold(_position: int) -> None:
        await released.wait()

    async with gateway_over(tokenizer, router) as gateway:
        router.before_token = hold
        running = [asyncio.create_task(tokens(gateway)) for _ in range(3)]
        await eventually(lambda: len(router.requests) == 3)
        with pytest.raises(ResourceExhausted, match="the queue of the only router is full") as refused:
            await tokens(gateway)
        assert refused.value.retry_after_s > 0
        assert len(router.requests) == 3
        released.set()
        assert [await task for task in running] == [expected(6)] * 3
        assert await tokens(gateway) == expected(6)
