"""A stopped process, which neither answers nor ends: streams go on elsewhere within two seconds, with the same tokens."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from chaos_support import NEW_TOKENS, SHORT, STRIKE_AT, assert_serves_on

from moiety.client import Client
from moiety.core.replica import Transport
from moiety.errors import Unavailable
from moiety.local.child_process import Child
from support.serving import Served
from support.streams import Streams

WITHIN_S = 2.0


@contextmanager
def stopped(child: Child) -> Iterator[None]:
    """Stops a process while the block runs."""
    child.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        child.signal(signal.SIGCONT)


async def struck(client: Client, child: Child, expected: list[list[int]]) -> float:
    """Stops `child` under eight streams, which must get their tokens all the same; returns the worst gap in seconds."""
    streams = Streams(client, NEW_TOKENS)
    await streams.wait_for_tokens(STRIKE_AT)
    with stopped(child):
        assert await streams.finish() == expected
        await assert_serves_on(client, expected)
    await assert_serves_on(client, expected)
    return streams.worst_gap


def test_a_stopped_expert_replica_over_shared_memory(served: Served, expected: list[list[int]]) -> None:
    """One of two holders is stopped: the other one takes its calls."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(2, 1)
        gap = await struck(client, served.cluster.experts(0)[0], expected)
        print(f"worst token gap, expert replica stopped, shared memory: {gap:.3f} s")
        assert gap <= WITHIN_S

    served.run(scenario)


def test_a_stopped_expert_replica_over_grpc(served: Served, expected: list[list[int]]) -> None:
    """The same, with a router that reaches its experts over gRPC. Takes 20 s, because two routers start and end."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(2, 1)
        over_grpc = await served.cluster.add_router(transport=Transport.GRPC)
        before = [child for child in served.cluster.replicas("router") if child is not over_grpc]
        for other in before:
            await served.cluster.drain(other)
        gap = await struck(client, served.cluster.experts(0)[0], expected)
        print(f"worst token gap, expert replica stopped, gRPC: {gap:.3f} s")
        assert gap <= WITHIN_S
        await served.cluster.add_router()
        await served.cluster.drain(over_grpc)

    served.run(scenario)


def test_a_stopped_router(served: Served, expected: list[list[int]]) -> None:
    """Of two routers each is stopped in turn, so that streams of a stopped one move and others are not disturbed."""

    async def scenario(client: Client) -> None:
        await served.scale_routers(2)
        for router in served.cluster.replicas("router"):
            gap = await struck(client, router, expected)
            print(f"worst token gap, router stopped: {gap:.3f} s")
            assert gap <= WITHIN_S

    served.run(scenario)


def test_a_stopped_gateway(served: Served, expected: list[list[int]]) -> None:
    """The client of a stopped gateway sees its stream break in time, and the gateway serves again once it goes on."""

    async def scenario(client: Client) -> None:
        (gateway,) = served.cluster.replicas("gateway")
        streams = Streams(client, 400)
        await streams.wait_for_tokens(SHORT)
        with stopped(gateway):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await streams.finish()
            took = time.monotonic() - began
        print(f"a stopped gateway's client sees the break after {took:.3f} s")
        assert took <= WITHIN_S
        async with asyncio.timeout(10):
            while True:
                try:
                    await assert_serves_on(client, expected)
                    return
                except Unavailable:
                    await asyncio.sleep(0.1)

    served.run(scenario)
