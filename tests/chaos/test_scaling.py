"""Groups grow, shrink and start from zero under eight streams: each ends with the tokens of a run without changes."""

from __future__ import annotations

import asyncio

from chaos_support import NEW_TOKENS, STRIKE_AT

from moiety.client import Client
from support.serving import Served
from support.streams import Streams


def test_a_group_grows_and_shrinks_again(served: Served, expected: list[list[int]]) -> None:
    """A second replica starts and drains while streams run: no stream fails or changes."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        growing = Streams(client, NEW_TOKENS)
        await growing.wait_for_tokens(STRIKE_AT)
        second = await served.cluster.add_expert(0)
        assert await growing.finish() == expected
        shrinking = Streams(client, NEW_TOKENS)
        await shrinking.wait_for_tokens(STRIKE_AT)
        await served.cluster.drain(second)
        assert await shrinking.finish() == expected
        print(f"worst token gap: {growing.worst_gap:.3f} s growing, {shrinking.worst_gap:.3f} s shrinking")

    served.run(scenario)


def test_requests_wait_for_the_first_replica_of_a_group(served: Served, expected: list[list[int]]) -> None:
    """Requests wait for a group at zero, and the registry lists the missing experts; its first replica completes them."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(0, 1)
        waiting = Streams(client, NEW_TOKENS)
        held = served.cluster.partition[0]
        async with asyncio.timeout(20):
            while not (missing := await served.cluster.registry.missing_experts()):
                await asyncio.sleep(0.05)
        assert all(experts <= held.layer(layer) for layer, experts in missing.items())
        await served.cluster.add_expert(0)
        assert await waiting.finish() == expected

    served.run(scenario)
