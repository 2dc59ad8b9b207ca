"""Redis goes away and comes back: serving goes on with the last table, and the registry fills itself again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from moiety.client import Client
from moiety.config.application import GroupSettings
from moiety.core.replica import Placement
from moiety.local.cluster import LocalCluster
from moiety.policy.autoscale import State, decide
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import TTL_S
from moiety.scaling.ledger import Ledger
from support.streams import Streams

NEW_TOKENS = 60
OUTAGE_S = 30.0


async def _rows(cluster: LocalCluster) -> int:
    """Rows that all routers have counted."""
    return sum(sum(map(sum, demand.rows)) for demand in (await cluster.registry.expert_demand()).values())


@pytest.mark.slow
def test_serving_outlives_its_registry(tiny: Callable[[str], str]) -> None:
    """Redis is gone for 30 s and comes back empty: streams keep their tokens, scaling holds, and all is as it was.

    Replicas are listed again, counters go on where they were, and a placement is followed again. Over 20 s: it stops its
    own Redis, so it needs a cluster of its own, and half a minute is what it is about.
    """

    async def scenario() -> None:
        redis = EmbeddedRedis()
        redis.start()
        try:
            served = LocalCluster(tiny("qwen3_moe"), dtype="float32", registry=redis.url)
            async with served as cluster, Client(cluster.address) as client:
                expected = await Streams(client, NEW_TOKENS).finish()
                listed = {replica.id for replica in await cluster.registry.replicas()}
                first, second = cluster.partition
                swapped = {"experts-0": second, "experts-1": first}
                await cluster.settled(await cluster.place(swapped))
                ledger = Ledger(cluster.registry)
                assert not (await ledger.read()).stale
                counted = await _rows(cluster)
                streams = Streams(client, NEW_TOKENS)
                await streams.reach(10)
                port = redis.port
                redis.stop()
                back_at = time.monotonic() + OUTAGE_S
                assert await streams.finish() == expected
                assert OUTAGE_S > TTL_S
                while time.monotonic() < back_at:
                    assert await Streams(client, NEW_TOKENS).finish() == expected
                    reading = await ledger.read()
                    decision = decide(reading.snapshot("experts-0", 1, first), State(), GroupSettings(), 0.0)
                    assert (decision.target, decision.reason) == (1, "the registry does not answer: stay at 1")
                redis = EmbeddedRedis(port=port)
                redis.start()
                async with asyncio.timeout(15):
                    while {replica.id for replica in await cluster.registry.replicas()} != listed:
                        await asyncio.sleep(0.1)
                assert await Streams(client, NEW_TOKENS).finish() == expected
                async with asyncio.timeout(15):
                    while await _rows(cluster) <= counted:
                        await asyncio.sleep(0.1)
                assert {r.deployment: r.held for r in await cluster.registry.replicas() if len(r.held)} == swapped
                lost = Placement(
                    2, {"experts-0": first, "experts-1": second}
                )  # what was in force was lost with the store
                assert await cluster.registry.set_placement(lost)
                await cluster.settled(2)
                assert await Streams(client, NEW_TOKENS).finish() == expected
        finally:
            redis.stop()

    asyncio.run(scenario())
