"""Groups grow, shrink, go to zero and wake under eight streams: every one ends with the tokens of a quiet run."""

from __future__ import annotations

import asyncio

import pytest

from moiety.client import Client
from support.serving import Served
from support.streams import Streams

NEW_TOKENS = 60
STRIKE_AT = 15  # tokens every stream has when something changes


@pytest.fixture(scope="module")
def expected(served: Served) -> list[list[int]]:
    """The tokens of a run without changes."""
    return served.run(lambda client: Streams(client, NEW_TOKENS).finish())


def test_a_group_grows_and_shrinks_again(served: Served, expected: list[list[int]]) -> None:
    """A second replica comes and goes while streams run: no token changes, and no stream notices the going."""

    async def scenario(client: Client) -> None:
        await served.have(1, 1)
        growing = Streams(client, NEW_TOKENS)
        await growing.reach(STRIKE_AT)
        second = await served.cluster.add_expert(0)
        assert await growing.finish() == expected
        shrinking = Streams(client, NEW_TOKENS)
        await shrinking.reach(STRIKE_AT)
        await served.cluster.drain(second)
        assert await shrinking.finish() == expected
        print(f"worst token gap: {growing.worst_gap:.3f} s growing, {shrinking.worst_gap:.3f} s shrinking")

    served.run(scenario)


def test_a_group_at_zero_wakes_for_requests_that_wait(served: Served, expected: list[list[int]]) -> None:
    """With no replica of a group, requests wait and say so in the registry; its first replica lets them go on."""

    async def scenario(client: Client) -> None:
        await served.have(0, 1)
        waiting = Streams(client, NEW_TOKENS)
        held = served.cluster.partition[0]
        async with asyncio.timeout(20):
            while not (wakes := await served.cluster.registry.missing_experts()):
                await asyncio.sleep(0.05)
        assert all(experts <= held.layer(layer) for layer, experts in wakes.items())
        await served.cluster.add_expert(0)
        assert await waiting.finish() == expected

    served.run(scenario)
