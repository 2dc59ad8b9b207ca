"""Two routers behind one gateway: both work, tokens are those of one, and prompts go where their prefix is cached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moiety.client import Client
from moiety.core.replica import Role
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.wire.channels import channel
from support.serving import Served
from support.streams import Streams

NEW_TOKENS = 24
LONG = [[3 + (7 * i * j + 13 * i + j) % 250 for j in range(96)] for i in range(1, 7)]
BLOCK = 16


@pytest.fixture
def second_router(served: Served) -> Iterator[None]:
    """Adds a router for the test, and drains it afterwards."""

    async def started() -> str:
        return (await served.cluster.add_router()).replica.id

    added = served.runner.run(started())
    yield
    (child,) = [child for child in served.cluster.children if child.replica.id == added]
    served.runner.run(served.cluster.drain(child))


async def running(served: Served) -> list[int]:
    """Returns the number of streams that each router runs now."""
    counts = []
    for child in [child for child in served.cluster.children if child.replica.role is Role.ROUTER]:
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


def test_two_routers_serve_as_one(served: Served, request: pytest.FixtureRequest) -> None:
    """Both routers run streams, with the tokens of one router; a repeated prompt goes to the router that has it cached."""
    expected = served.run(lambda client: Streams(client, NEW_TOKENS).finish())
    request.getfixturevalue("second_router")

    async def scenario(client: Client) -> None:
        spread = [0]
        while not all(spread):  # until the gateway has found the second router
            streams = Streams(client, NEW_TOKENS)
            await streams.wait_for_tokens(2)
            spread = await running(served)
            assert await streams.finish() == expected
        for prompt in LONG:
            await cached(client, prompt)
        for prompt in LONG:
            again = [*prompt, 1, 2, 3]
            assert await cached(client, again) >= len(again) // BLOCK * BLOCK - BLOCK

    served.run(scenario)
