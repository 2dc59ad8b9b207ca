"""A client retries after the retry delay, as often as allowed and within its timeout."""

from __future__ import annotations

import asyncio
import time

import pytest
from gateway_support import SHAPE, Gateway, expected, run, tokens

from moiety.errors import InvalidRequest, ResourceExhausted
from moiety.gateway.text import Tokenizer
from moiety.testing import FakeEngine, eventually

HINT_S = 1.0  # a gateway's retry delay before any request has shown how long one takes


def test_a_client_retries_after_the_delay(tokenizer: Tokenizer):
    """A refused client waits for the retry delay, retries and gets its tokens, without an error for the caller."""
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
    """A refusal raises at once without `retries`, after the last of them, or when the timeout is too short for another."""
    router = FakeEngine("a", SHAPE, places=0)

    async def scenario(gateway: Gateway) -> None:
        for options, attempts in (({}, 1), ({"retries": 5, "timeout_s": HINT_S / 2}, 1), ({"retries": 1}, 2)):
            router.refused, began = 0, time.monotonic()
            with pytest.raises(ResourceExhausted, match="the queue of the only router is full"):
                await tokens(gateway, **options)
            assert router.refused == attempts
            assert attempts > 1 or time.monotonic() - began < HINT_S / 2

    run(scenario, tokenizer, router)


def test_other_errors_are_not_retried(tokenizer: Tokenizer):
    """An invalid request raises at once, even with `retries`."""
    router = FakeEngine("a", SHAPE)

    async def scenario(gateway: Gateway) -> None:
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await tokens(gateway, 1000, retries=5)
        assert not router.requests

    run(scenario, tokenizer, router)
