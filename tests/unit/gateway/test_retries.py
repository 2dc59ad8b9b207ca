"""A client that may come again does so when it was told to, and no longer than it has time for."""

from __future__ import annotations

import asyncio
import time

import pytest
from gateway_support import SHAPE, Gateway, expected, run, tokens

from moiety.errors import InvalidRequest, ResourceExhausted
from moiety.gateway.text import Tokenizer
from moiety.testing import FakeEngine, eventually

HINT_S = 1.0  # a gateway's, as long as no request has shown how long one takes


def test_a_client_comes_again_after_the_hint(tokenizer: Tokenizer):
    """Refused, it waits as long as it was told, asks again and gets its tokens; nobody sees the refusal."""
    router = FakeEngine("a", SHAPE, places=0)

    async def scenario(gateway: Gateway) -> None:
        began = time.monotonic()
        waiting = asyncio.create_task(tokens(gateway, retries=3))
        await eventually(lambda: router.refused == 1)
        router.places = 1
        assert await waiting == expected(6)
        assert time.monotonic() - began >= HINT_S
        assert router.refused == 1

    run(scenario, tokenizer, router)


def test_retries_are_off_unless_asked_for_and_end(tokenizer: Tokenizer):
    """Without `retries` a refusal is told at once; with it, once they are spent or time is too short for another."""
    router = FakeEngine("a", SHAPE, places=0)

    async def scenario(gateway: Gateway) -> None:
        for options, asked in (({}, 1), ({"retries": 5, "timeout_s": HINT_S / 2}, 1), ({"retries": 1}, 2)):
            router.refused, began = 0, time.monotonic()
            with pytest.raises(ResourceExhausted, match="the queue of the one router is full"):
                await tokens(gateway, **options)
            assert router.refused == asked
            assert asked > 1 or time.monotonic() - began < HINT_S / 2

    run(scenario, tokenizer, router)


def test_other_errors_are_not_tried_again(tokenizer: Tokenizer):
    """A request that is wrong stays wrong."""
    router = FakeEngine("a", SHAPE)

    async def scenario(gateway: Gateway) -> None:
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await tokens(gateway, 1000, retries=5)
        assert not router.requests

    run(scenario, tokenizer, router)
