"""Routers come and go: requests are spread, resumed behind the tokens they have, and end only for good reasons."""

from __future__ import annotations

import asyncio
import re

import pytest
from gateway_support import PROMPT, SHAPE, Gateway, expected, run, tokens

from moiety.errors import DeadlineExceeded, MoietyError, NoHolder, Unavailable
from moiety.gateway.text import Tokenizer
from moiety.testing import FakeEngine, eventually
from moiety.wire import status


def engine(name: str, revision: str = "fake-revision") -> FakeEngine:
    """A ready router."""
    return FakeEngine(name, SHAPE, revision=revision)


def dies_before(router: FakeEngine, position: int) -> None:
    """Makes `router` vanish when it should generate this token."""
    vanishing: list[asyncio.Task[None]] = []

    async def before_token(at: int) -> None:
        if at == position:
            vanishing.append(asyncio.create_task(router.vanish()))
            await asyncio.Event().wait()

    router.before_token = before_token


@pytest.mark.parametrize("position", [0, 1, 5])  # before anything was sent; behind the first token; at the last
def test_a_lost_router_costs_no_token(tokenizer: Tokenizer, position: int):
    """The stream goes on, on another router, behind the tokens it has: the same tokens, each once."""
    first, second = engine("a"), engine("b")

    async def scenario(gateway: Gateway) -> None:
        dies_before(first, position)
        assert await tokens(gateway) == expected(6)
        (resumed,) = second.requests
        assert list(resumed.generated_ids) == expected(position)
        assert list(resumed.prompt_ids) == PROMPT
        assert resumed.sampling.seed == 0
        assert resumed.revision == "fake-revision"

    run(scenario, tokenizer, first, second)


def test_losing_every_router_waits_for_the_next(tokenizer: Tokenizer):
    """Two routers lost in one stream, then none: the request resumes on the one that comes."""
    routers = [engine("a"), engine("b")]
    for router in routers:
        dies_before(router, 2 if router.id == "a" else 4)
    late = engine("c")

    async def scenario(gateway: Gateway) -> None:
        running = asyncio.create_task(tokens(gateway))
        await eventually(lambda: bool(routers[1].requests))
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
        dies_before(only, 1)
        with pytest.raises(Unavailable, match="no router of revision fake-revision is ready"):
            await tokens(gateway)

    run(scenario, tokenizer, only, router_wait_s=0.3)


def test_a_request_keeps_one_revision_for_life(tokenizer: Tokenizer):
    """A router of another revision never takes over: its tokens would be another model's."""
    first, other = engine("a"), engine("b", revision="newer")

    async def scenario(gateway: Gateway) -> None:
        dies_before(first, 3)
        with pytest.raises(Unavailable, match="of revision fake-revision"):
            await tokens(gateway)
        assert not other.requests

    run(scenario, tokenizer, first, other, router_wait_s=0.3)


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
    first, second = engine("a"), engine("b")

    async def scenario(gateway: Gateway) -> None:
        async def refuse(position: int) -> None:
            if position == 1:
                raise cause

        first.before_token = refuse
        with pytest.raises(MoietyError, match=re.escape(str(cause))) as refused:
            await tokens(gateway)
        assert status.code_of(refused.value) is status.code_of(cause)
        assert not second.requests

    run(scenario, tokenizer, first, second)
