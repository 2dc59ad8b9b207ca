"""Routers come and go: requests are spread, resumed behind the tokens they have, and end only for good reasons."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace

import pytest
from gateway_support import PROMPT, SHAPE, Gateway, chunks, die_before, expected, run, tokens

from moiety.core.replica import ReplicaState
from moiety.errors import DeadlineExceeded, MoietyError, NoHolder, ResourceExhausted, Unavailable
from moiety.gateway.text import Tokenizer
from moiety.internal.v1 import engine_pb2
from moiety.testing import FakeEngine, eventually
from moiety.wire import status


def _generated(request: engine_pb2.EngineRequest) -> int:
    return len(request.generated_ids)


def engine(name: str, revision: str = "fake-revision") -> FakeEngine:
    """A ready router."""
    return FakeEngine(name, SHAPE, revision=revision)


@pytest.mark.parametrize("position", [0, 1, 5])  # before anything was sent; behind the first token; at the last
def test_a_lost_router_costs_no_token(tokenizer: Tokenizer, position: int):
    """The stream goes on, on another router, behind the tokens it has: the same tokens, each once."""
    routers = engine("a"), engine("b")

    async def scenario(gateway: Gateway) -> None:
        die_before(gateway, position, *routers)
        assert await tokens(gateway) == expected(6)
        lost, resumed = sorted((request for router in routers for request in router.requests), key=_generated)
        assert not lost.generated_ids
        assert list(resumed.generated_ids) == expected(position)
        assert list(resumed.prompt_ids) == PROMPT
        assert resumed.sampling.seed == 0
        assert resumed.revision == "fake-revision"

    run(scenario, tokenizer, *routers)


def test_losing_every_router_waits_for_the_next(tokenizer: Tokenizer):
    """Two routers lost in one stream, then none: the request resumes on the one that comes."""
    routers = [engine("a"), engine("b")]
    late = engine("c")

    async def scenario(gateway: Gateway) -> None:
        for router in routers:
            die_before(gateway, 3, router)
        running = asyncio.create_task(tokens(gateway))
        await eventually(lambda: all(router.requests for router in routers))
        await late.start(gateway.registry)
        try:
            assert await running == expected(6)
        finally:
            await late.vanish()

    run(scenario, tokenizer, *routers)


def test_no_other_router_in_time_is_unavailable(tokenizer: Tokenizer):
    """A request whose router is gone for good ends with UNAVAILABLE, naming the revision it needs."""
    only = engine("a")

    async def scenario(gateway: Gateway) -> None:
        die_before(gateway, 1, only)
        with pytest.raises(Unavailable, match="no router of revision fake-revision is ready"):
            await tokens(gateway)

    run(scenario, tokenizer, only, router_wait_s=0.3)


def test_a_request_keeps_one_revision_for_life(tokenizer: Tokenizer):
    """A router of another revision never takes over: its tokens would be another model's."""
    routers = engine("a"), engine("b", revision="newer")

    async def scenario(gateway: Gateway) -> None:
        die_before(gateway, 3, *routers)
        with pytest.raises(Unavailable, match=r"no router of revision (fake-revision|newer) is ready"):
            await tokens(gateway)
        assert sum(len(router.requests) for router in routers) == 1

    run(scenario, tokenizer, *routers, router_wait_s=0.3)


def test_requests_are_spread(tokenizer: Tokenizer):
    """A new request goes to the router with the fewest of this gateway's."""
    routers, released = [engine("a"), engine("b")], asyncio.Event()

    async def hold(_position: int) -> None:
        await released.wait()

    async def scenario(gateway: Gateway) -> None:
        for router in routers:
            router.before_token = hold
        running = []
        for count in range(1, 5):
            running.append(asyncio.create_task(tokens(gateway)))
            await eventually(lambda count=count: sum(len(router.requests) for router in routers) == count)
        assert [len(router.requests) for router in routers] == [2, 2]
        released.set()
        assert [await task for task in running] == [expected(6)] * 4

    run(scenario, tokenizer, *routers)


@pytest.mark.parametrize("cause", [NoHolder(3, [1], 30.0), MoietyError("the step failed"), DeadlineExceeded("late")])
def test_a_routers_own_refusal_is_passed_on(tokenizer: Tokenizer, cause: MoietyError):
    """A living router that ends a request (its experts are gone, say) is believed; no other one is troubled."""
    routers = engine("a"), engine("b")

    async def scenario(gateway: Gateway) -> None:
        async def refuse(position: int) -> None:
            if position == 1:
                raise cause

        for router in routers:
            router.before_token = refuse
        with pytest.raises(MoietyError, match=re.escape(str(cause))) as refused:
            await tokens(gateway)
        assert status.code_of(refused.value) is status.code_of(cause)
        assert sum(len(router.requests) for router in routers) == 1

    run(scenario, tokenizer, *routers)


def choosing(*names: str, places: int = 8, slots: int = 4) -> list[FakeEngine]:
    """Ready routers that cache prefixes by blocks of four tokens."""
    return [FakeEngine(name, SHAPE, places=places, slots=slots, blocks=64) for name in names]


LONG = [list(range(start, start + 41)) for start in (10, 60, 110, 160, 210, 260)]


def test_a_prompt_goes_to_where_its_prefix_is(tokenizer: Tokenizer):
    """Sent again, longer, each prompt finds the router that has it; the client hears how much of it was cached."""
    routers = choosing("a", "b", "c")

    async def scenario(gateway: Gateway) -> None:
        for prompt in LONG:
            assert (await chunks(gateway, prompt, max_tokens=2))[-1].cached_tokens == 0
        assert len([router for router in routers if router.requests]) > 1
        for prompt in LONG:
            last = (await chunks(gateway, [*prompt, 1, 2, 3, 4], max_tokens=2))[-1]
            assert last.cached_tokens == 40
        other = await chunks(gateway, LONG[0], max_tokens=2, tenant="somebody else")
        assert other[-1].cached_tokens == 0

    run(scenario, tokenizer, *routers)


def test_a_conversation_goes_to_where_its_last_answer_is(tokenizer: Tokenizer):
    """The output counts as what the next prompt starts with, so a turn goes to the router of the turn before."""
    routers = choosing("a", "b", "c")

    async def scenario(gateway: Gateway) -> None:
        said = await tokens(gateway, 12)
        for prompt in LONG:
            await chunks(gateway, prompt, max_tokens=1)
        await chunks(gateway, [*PROMPT, *said, 9], max_tokens=1)
        (home,) = [router for router in routers if list(router.requests[0].prompt_ids) == PROMPT]
        assert list(home.requests[-1].prompt_ids) == [*PROMPT, *said, 9]

    run(scenario, tokenizer, *routers)


def test_a_router_that_evicted_a_prompt_is_still_right(tokenizer: Tokenizer):
    """A guess that turns out wrong costs nothing but the prefill, and is not made again."""
    routers = choosing("a", "b")

    async def scenario(gateway: Gateway) -> None:
        await chunks(gateway, LONG[0], max_tokens=2)
        for router in routers:
            router.empty_cache()
        for cached in (0, 40):
            got = await chunks(gateway, LONG[0], max_tokens=2)
            assert [token for chunk in got for token in chunk.token_ids] == expected(2, LONG[0])
            assert got[-1].cached_tokens == cached

    run(scenario, tokenizer, *routers)


def test_a_full_router_is_passed_over(tokenizer: Tokenizer):
    """A request that one router has no place for goes to the next; only when all are full is it refused, with a hint."""
    routers, released = [FakeEngine("a", SHAPE, places=3), FakeEngine("b", SHAPE, places=1)], asyncio.Event()

    async def hold(_position: int) -> None:
        await released.wait()

    async def scenario(gateway: Gateway) -> None:
        for router in routers:
            router.before_token = hold
        running = []
        for count in range(1, 5):
            running.append(asyncio.create_task(tokens(gateway)))
            await eventually(lambda count=count: sum(len(router.requests) for router in routers) == count)
        assert [len(router.requests) for router in routers] == [3, 1]
        with pytest.raises(ResourceExhausted, match="the queue of each of 2 routers is full") as refused:
            await tokens(gateway)
        assert refused.value.retry_after_s >= 0.25
        released.set()
        assert [await task for task in running] == [expected(6)] * 4
        assert await tokens(gateway) == expected(6)

    run(scenario, tokenizer, *routers)


def test_a_resumed_request_waits_for_a_place(tokenizer: Tokenizer):
    """Accepted once, a request whose router is lost is not refused by one that is full: it goes on when there is room."""
    first, full = engine("a"), FakeEngine("b", SHAPE, places=0)

    async def scenario(gateway: Gateway) -> None:
        die_before(gateway, 2, first)
        running = asyncio.create_task(tokens(gateway))
        await eventually(lambda: full.refused > 0 and len(first.requests) == 1)
        refused = full.refused
        await eventually(lambda: full.refused > refused)
        full.places = 1
        assert await running == expected(6)
        assert list(full.requests[0].generated_ids) == expected(2)

    run(scenario, tokenizer, first, full)


def test_a_router_that_drains_gets_nothing_new(tokenizer: Tokenizer):
    """Its streams end where they are; requests that come go elsewhere, however much of them it has cached."""
    routers, released = choosing("a", "b"), asyncio.Event()

    async def hold(position: int) -> None:
        if position:
            await released.wait()

    async def scenario(gateway: Gateway) -> None:
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

    run(scenario, tokenizer, *routers)


def test_a_router_that_is_full_with_our_own_requests_is_not_asked(tokenizer: Tokenizer):
    """As many as it runs and lets wait go there; the next is told when to come again, and costs the router nothing."""
    router, released = FakeEngine("a", SHAPE, slots=2, queue=1), asyncio.Event()

    async def hold(_position: int) -> None:
        await released.wait()

    async def scenario(gateway: Gateway) -> None:
        router.before_token = hold
        running = [asyncio.create_task(tokens(gateway)) for _ in range(3)]
        await eventually(lambda: len(router.requests) == 3)
        with pytest.raises(ResourceExhausted, match="the queue of the one router is full") as refused:
            await tokens(gateway)
        assert refused.value.retry_after_s > 0
        assert len(router.requests) == 3
        released.set()
        assert [await task for task in running] == [expected(6)] * 3
        assert await tokens(gateway) == expected(6)

    run(scenario, tokenizer, router)
