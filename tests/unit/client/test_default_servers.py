"""Servers with gRPC's default settings, as proxies and others have them, never end a client's connection for its pings."""

from __future__ import annotations

import asyncio

import pytest
from client_support import Generations, default_server, sync_tokens, tokens

from moiety.client import Client, SyncClient
from moiety.errors import PeerLost
from moiety.wire.channels import CLIENT_PINGS

DEFAULT_INTERVAL_S = 300.0  # between two pings without data that gRPC's servers expect at least


async def test_a_silent_request_at_a_default_server():
    """A request that gets no token for 6 s succeeds with both clients; one that pings twice a second is cut off."""
    generations = Generations()
    generations.silent_s = 6.0
    async with default_server(generations) as address:

        def sync() -> list[int]:
            with SyncClient(address) as client:
                return sync_tokens(client, 2)

        async with Client(address) as client, Client(address, ping_every_s=0.5) as eager:
            cut_off = asyncio.create_task(tokens(eager, 2))
            assert await asyncio.gather(tokens(client, 2), asyncio.to_thread(sync)) == [[0, 1], [0, 1]]
            with pytest.raises(PeerLost, match="Too many pings"):
                await cut_off


async def test_a_request_that_is_silent_for_long():
    """A client's pings come less often than default servers allow: after many of them the request still succeeds.

    Client and server run 300 times as fast here: the server allows one ping in a second.
    """
    generations = Generations()
    generations.silent_s = 8.0
    fast = ("grpc.http2.min_ping_interval_without_data_ms", 1000)
    every_s = CLIENT_PINGS.every_s / DEFAULT_INTERVAL_S
    async with default_server(generations, fast) as address, Client(address, ping_every_s=every_s) as client:
        assert await tokens(client, 2) == [0, 1]
