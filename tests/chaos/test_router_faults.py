"""Two routers behind one gateway: both work and keep their prefixes, one is killed, one drains; tokens are those of one."""

from __future__ import annotations

import asyncio
import signal

from chaos_support import NEW_TOKENS, SHORT, STRIKE_AT, assert_serves_on

from moiety.client import Client
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.wire.channels import channel
from support.serving import Served
from support.streams import Streams

LONG = [[3 + (7 * i * j + 13 * i + j) % 250 for j in range(96)] for i in range(1, 7)]
BLOCK = 16


async def running(served: Served) -> list[int]:
    """Returns the number of streams that each router runs now."""
    counts = []
    for child in served.cluster.replicas("router"):
        async with channel(child.replica.address) as link:
            description = await engine_pb2_grpc.EngineServiceStub(link).DescribeEngine(
                engine_pb2.DescribeEngineRequest()
            )
            counts.append(description.running)
    return counts


async def cached(client: Client, prompt: list[int]) -> int:
    """Generates from `prompt` and returns how many of its tokens the router had cached."""
    (*_, last) = [chunk async for chunk in client.generate(prompt, max_tokens=2, ignore_eos=True)]
    return last.cached_tokens


def test_two_routers_serve_as_one(served: Served, expected: list[list[int]]) -> None:
    """Both routers run streams, with the tokens of one router; a repeated prompt goes to the router that has it cached."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        await served.scale_routers(2)
        spread = [0]
        while not all(spread):  # until the gateway has found the second router
            streams = Streams(client, SHORT)
            await streams.wait_for_tokens(2)
            spread = await running(served)
            assert await streams.finish() == [tokens[:SHORT] for tokens in expected]
        for prompt in LONG:
            await cached(client, prompt)
        for prompt in LONG:
            again = [*prompt, 1, 2, 3]
            assert await cached(client, again) >= len(again) // BLOCK * BLOCK - BLOCK

    served.run(scenario)


def test_another_router_continues_the_streams_of_a_lost_one(served: Served, expected: list[list[int]]) -> None:
    """kill -9 of one of two routers: the other continues after the tokens already sent; none is lost or repeated."""

    async def scenario(client: Client) -> None:
        await served.scale_routers(2)
        doomed = served.cluster.replicas("router")[0]
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        doomed.signal(signal.SIGKILL)
        assert await streams.finish() == expected
        await doomed.ended()

    served.run(scenario)


def test_a_drained_router_finishes_its_streams(served: Served, expected: list[list[int]]) -> None:
    """A draining router takes no new requests and finishes its running ones; another router serves the next."""

    async def scenario(client: Client) -> None:
        await served.scale_routers(2)
        leaving = served.cluster.replicas("router")[0]
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        finished, _ = await asyncio.gather(streams.finish(), served.cluster.drain(leaving, grace_s=30.0))
        assert finished == expected
        await assert_serves_on(client, expected)

    served.run(scenario)
