"""A client retries after the retry delay, as often as allowed and within its timeout."""

from __future__ import annotations

import asyncio
import time

import pytest
from gateway_support import SHAPE, expected, gateway_over, tokens

from moiety.errors import InvalidRequest, ResourceExhausted
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, eventually

HINT_S = 1.0  # a gateway's retry delay before any request has shown how long one takes


async def test_a_client_retries_after_the_delay(tokenizer: Tokenizer):
    """A refused client waits for the retry delay, retries and gets its tokens, without an error for the caller."""
    router = FakeEngine("a", SHAPE, places=0)
    async with gateway_over(tokenizer, router) as gateway:
        began = time.monotonic()
        waiting = asyncio.create_task(tokens(gateway, retries=3))
        await eventually(lambda: router.refused == 1)
        router.places = 1
        assert await waiting == expected(6)
        assert time.monotonic() - began >= HINT_S
        assert router.refused == 1


async def test_retries_are_off_unless_asked_for_and_end(tokenizer: Tokenizer):
    """A refusal raises at once without `retries`, after the last of them, or when the timeout is too short for another."""
    router = FakeEngine("a", SHAPE, places=0)
    async with gateway_over(tokenizer, router) as gateway:
        for options, attempts in (({}, 1), ({"retries": 5, "timeout_s": HINT_S / 2}, 1), ({"retries": 1}, 2)):
            router.refused, began = 0, time.monotonic()
            with pytest.raises(ResourceExhausted, match="the queue of the only router is full"):
                await tokens(gateway, **options)
            assert router.refused == attempts
            assert attempts > 1 or time.monotonic() - began < HINT_S / 2


async def test_other_errors_are_not_retried(tokenizer: Tokenizer):
    """An invalid request raises at once, even with `retries`."""
    router = FakeEngine("a", SHAPE)
    async with gateway_over(tokenizer, router) as gateway:
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await tokens(gateway, 1000, retries=5)
        assert not router.requests
