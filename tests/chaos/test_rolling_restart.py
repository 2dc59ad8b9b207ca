"""Every service is replaced under eight streams, and the whole system ends under them: none fails, none changes."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from chaos_support import NEW_TOKENS, SHORT, STRIKE_AT, assert_serves_on

from moiety.client import Client
from moiety.errors import Unavailable
from moiety.local.child_process import Child
from moiety.local.cluster import LocalCluster
from support.serving import Served
from support.streams import Streams

GRACE_S = 60.0
SLOW = {"capacity": 1500.0}  # rows per second: streams last for some seconds


@asynccontextmanager
async def cluster_of(served: Served) -> AsyncIterator[LocalCluster]:
    """A cluster like `served`, whose gateway has fixed ports, which its successor shares."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"port": one.getsockname()[1], "http_port": other.getsockname()[1]}
    model, registry = served.cluster.model, served.redis.url
    async with LocalCluster(model, registry=registry, dtype="float32", gateway=ports, expert=SLOW) as cluster:
        yield cluster


async def replace(cluster: LocalCluster, old: Child, successor: Awaitable[Child]) -> None:
    """Lets `old` leave while its successor starts, as Serve does."""
    await asyncio.gather(cluster.drain(old, GRACE_S), successor)


async def ask_until(stopped: asyncio.Event, address: str) -> int:
    """Sends short requests over new connections, one after the other, until `stopped`; returns how many were served."""
    served = 0
    while not stopped.is_set():
        async with Client(address) as client:
            (tokens,) = await Streams(client, 2, prompts=[[5, 6, 7]]).finish()
        assert len(tokens) == 2
        served += 1
    return served


def test_a_rolling_restart_of_every_service(served: Served, expected: list[list[int]]) -> None:
    """Streams outlive the replacement of every service, with the same tokens, and no new request fails meanwhile."""

    async def scenario() -> None:
        async with cluster_of(served) as cluster, Client(cluster.address) as client:
            stopped = asyncio.Event()
            asking = asyncio.create_task(ask_until(stopped, cluster.address))
            (gateway,) = cluster.replicas("gateway")
            for old, successor in [
                (cluster.experts(0)[0], lambda: cluster.add_expert(0)),
                (cluster.experts(1)[0], lambda: cluster.add_expert(1)),
                (cluster.router(), cluster.add_router),
                (gateway, cluster.add_gateway),
            ]:
                streams = Streams(client, NEW_TOKENS)
                await streams.wait_for_tokens(STRIKE_AT)
                began = time.monotonic()
                _, tokens = await asyncio.gather(replace(cluster, old, successor()), streams.finish())
                assert tokens == expected, old.replica.id
                print(f"{old.replica.id}: {time.monotonic() - began:.1f} s, worst gap {streams.worst_gap:.2f} s")
            stopped.set()
            assert await asking
            assert all(child.replica.id.endswith(("#5", "#6", "#7", "#8")) for child in cluster.children)

    served.runner.run(scenario())


def test_the_end_of_a_system_waits_for_its_streams(served: Served, expected: list[list[int]]) -> None:
    """Both doors refuse new requests with the reason, running streams finish, and then the services end."""

    async def scenario() -> None:
        async with cluster_of(served) as cluster, Client(cluster.address) as client:
            streams = Streams(client, NEW_TOKENS)
            await streams.wait_for_tokens(STRIKE_AT)
            ended: list[str] = []
            for child in cluster.children:
                assert child.follower is not None
                child.follower.add_done_callback(lambda _, role=child.replica.role: ended.append(role))
            address, http_address = cluster.address, cluster.http_address
            stopping = asyncio.create_task(cluster.stop(GRACE_S))
            await _until_refused(address)
            async with aiohttp.ClientSession() as session:
                body = {"model": "", "prompt": [1, 2, 3]}
                async with session.post(f"http://{http_address}/v1/completions", json=body) as answer:
                    assert answer.status == 503
                    assert "the server is shutting down" in await answer.text()
            assert not stopping.done()
            assert await streams.finish() == expected
            await stopping
            assert sorted(ended) == ["expert", "expert", "gateway", "router"]

    served.runner.run(scenario())


async def _until_refused(address: str) -> None:
    async with asyncio.timeout(10), Client(address) as client:
        refusal = ""
        while "the server is shutting down" not in refusal:
            try:
                await Streams(client, SHORT, prompts=[[1, 2]]).finish()
            except Unavailable as error:
                refusal = str(error)


@pytest.mark.slow
def test_streams_that_do_not_finish_in_time_are_told_so(served: Served) -> None:
    """At the end of the grace a stream ends with the reason; an idle system ends at once, however long the grace is.

    Over 20 s: it starts two systems.
    """

    async def scenario() -> None:
        async with cluster_of(served) as cluster, Client(cluster.address) as client:
            streams = Streams(client, 500, prompts=[[1, 2, 3]])
            await streams.wait_for_tokens(2)
            stopping = asyncio.create_task(cluster.stop(1.0))
            with pytest.raises(Unavailable, match=r"the server is shutting down.*drain_s"):
                await streams.finish()
            await stopping
        async with cluster_of(served) as cluster:
            began = time.monotonic()
            await cluster.stop(600.0)
            assert time.monotonic() - began < 20.0

    served.runner.run(scenario())


def test_a_drain_without_a_successor_ends_once_the_service_is_unused(served: Served, expected: list[list[int]]) -> None:
    """The only holder of its experts serves on while streams need it, and leaves when they have ended."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        tokens, _ = await asyncio.gather(streams.finish(), served.cluster.drain(served.cluster.experts(0)[0], GRACE_S))
        assert tokens == expected
        await served.scale_experts(1, 1)
        await assert_serves_on(client, expected)

    served.run(scenario)
