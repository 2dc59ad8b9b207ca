"""Clients that are far away connect and stream; one whose connection stands still for a while loses nothing."""

from __future__ import annotations

import asyncio
import math
import socket
import time

import pytest
from client_support import PROMPT, Generations, relayed, serving, sync_tokens, tokens

from moiety.client import Client, SyncClient
from moiety.errors import ConfigError, PeerLost
from moiety.testing import HOST, eventually

LONG_PROMPT = [7] * 200_000  # 200 KB: three times what HTTP/2 lets a new connection send at once


@pytest.mark.parametrize("round_trip_s", [0.2, 0.8, 2.0])
async def test_the_first_request_over_a_slow_link_passes(round_trip_s: float):
    """A new client's first request gets all its tokens, and so does the next one, with a long prompt."""
    generations = Generations()
    async with serving(generations) as address, relayed(address, round_trip_s) as (relay, far), Client(far) as client:
        assert await tokens(client, 20) == list(range(20))
        stream = client.generate(LONG_PROMPT, max_tokens=20)
        assert [token async for chunk in stream for token in chunk.token_ids] == list(range(20))
        assert (generations.asked, relay.connections) == (2, 1)


async def test_the_synchronous_client_over_a_slow_link():
    """Its first request passes, too."""
    async with serving(Generations()) as address, relayed(address, 0.8) as (_, far):

        def work() -> list[int]:
            with SyncClient(far) as client:
                return sync_tokens(client, 20)

        assert await asyncio.to_thread(work) == list(range(20))


async def test_a_connection_that_stands_still_loses_nothing():
    """A stream over a connection on which nothing passes for 3 s, as with a suspended laptop, goes on."""
    generations = Generations()
    generations.held_at = 3
    async with serving(generations) as address, relayed(address) as (relay, far), Client(far) as client:
        got = []
        async for chunk in client.generate(PROMPT, max_tokens=6):
            got += chunk.token_ids
            if got[-1] == 2:
                relay.stall(True)
                generations.go.set()
                asyncio.get_running_loop().call_later(3.0, relay.stall, False)
        assert got == list(range(6))


async def test_a_client_that_pings_often_notices_a_dead_connection_soon():
    """With tight pings, a stream over a connection that is open, but dead, ends with PeerLost."""
    generations = Generations()
    generations.held_at = 3
    async with (
        serving(generations) as address,
        relayed(address) as (relay, far),
        Client(far, ping_every_s=0.5, ping_timeout_s=1.0) as client,
    ):
        waiting = asyncio.create_task(tokens(client, 6))
        await eventually(lambda: generations.running == 1)
        relay.stall(True)
        began = time.monotonic()
        with pytest.raises(PeerLost):
            await waiting
        assert time.monotonic() - began < 15.0


async def test_connecting_takes_as_long_as_the_client_allows():
    """An address that accepts connections and says nothing fails after `connect_timeout_s`."""
    with socket.create_server((HOST, 0)) as silent:
        address = f"{HOST}:{silent.getsockname()[1]}"
        async with Client(address, connect_timeout_s=0.5) as client:
            began = time.monotonic()
            with pytest.raises(PeerLost, match="timed out"):
                await tokens(client, 1)
            assert 0.4 < time.monotonic() - began < 5.0


async def test_times_of_a_client_are_positive():
    """A client refuses 0, negative times and NaN by name, and takes infinity."""
    for name in ("ping_every_s", "ping_timeout_s", "connect_timeout_s"):
        for value in (0.0, -1.0, math.nan):
            with pytest.raises(ConfigError, match=name):
                Client("127.0.0.1:1", **{name: value})
    async with serving(Generations()) as address, Client(address, ping_every_s=math.inf) as client:
        assert await tokens(client, 3) == [0, 1, 2]
