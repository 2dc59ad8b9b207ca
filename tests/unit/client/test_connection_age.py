"""Connections to a gateway have an age limit: clients open new ones, which a load balancer may lead to other gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from client_support import Generations, relayed, serving, tokens
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moiety import compose
from moiety.client import Client
from moiety.core.replica import Role
from moiety.errors import PeerLost
from moiety.registry.file import FileRegistryWriter
from moiety.testing import eventually
from moiety.wire.server import public_door


async def test_requests_move_to_a_new_connection_and_streams_go_on():
    """Requests one after another, each of which succeeds, leave an old connection, on which a long stream goes on unharmed."""
    generations = Generations()
    generations.held_at = 3
    async with serving(generations, public_door(1.0, None)) as address, Client(address) as client:
        long = asyncio.create_task(tokens(client, 2000))
        await eventually(lambda: generations.running == 1)
        (first,) = generations.peers
        async with asyncio.timeout(20):
            while len(generations.peers) < 3:
                assert await tokens(client, 5, tenant="others") == list(range(5))
        assert generations.peers[first] > 1  # the first of the short requests shared the long one's connection
        generations.go.set()
        assert await long == list(range(2000))


async def test_a_grace_bounds_what_is_left_on_an_old_connection():
    """With a grace, a stream on an old connection ends with PeerLost after it."""
    generations = Generations()
    generations.held_at = 3
    async with serving(generations, public_door(1.0, 0.5)) as address, Client(address) as client:
        with pytest.raises(PeerLost):
            await tokens(client, 6)


async def test_a_gateway_has_the_age_of_its_settings(tiny: Callable[[str], str], tmp_path: Path):
    """A gateway's `max_connection_age_s` counts: health checks move to a new connection, a stream of them stays and goes on."""
    FileRegistryWriter(tmp_path / "registry.json")
    values = {"model": tiny("mixtral"), "registry": f"file://{tmp_path / 'registry.json'}", "port": 0}
    settings = compose.settings_of(Role.GATEWAY, {**values, "max_connection_age_s": 1.0})
    running = await compose.start(settings, replica_id="g", node="here")
    try:
        async with relayed(running.replica.address) as (relay, address), grpc.aio.insecure_channel(address) as link:
            health, request = health_pb2_grpc.HealthStub(link), health_pb2.HealthCheckRequest()
            watch = health.Watch(request)
            states = [(await watch.read()).status]
            async with asyncio.timeout(20):
                while relay.connections < 2:
                    await health.Check(request)
            await running.close()
            states.append((await watch.read()).status)
        assert states == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    finally:
        await running.close()
