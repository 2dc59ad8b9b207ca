"""Redis stops and comes back: services go on with the last table of replicas, and fill the registry again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from moiety.client import Client
from moiety.config.options import Scaling
from moiety.core.replica import Placement
from moiety.local.cluster import LocalCluster
from moiety.policy.autoscale import State, decide
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import TTL_S
from moiety.registry.watch import GRACE_S
from moiety.scaling.ledger import Ledger
from support.refusing_redis import REFUSALS, RefusingRedis
from support.streams import Streams

NEW_TOKENS = 60
OUTAGE_S = 30.0
REFUSED_S = 12.0  # the entries of all services expire, and their readers' grace is over


async def _rows(cluster: LocalCluster) -> int:
    """Returns the rows that all routers have counted."""
    return sum(sum(map(sum, demand.rows)) for demand in (await cluster.registry.expert_demand()).values())


@pytest.mark.slow
async def test_serving_outlives_its_registry(tiny: Callable[[str], str]) -> None:
    """Redis stops for 30 s and comes back empty: tokens stay the same, scaling keeps its target, the registry recovers.

    Replicas are listed again, counters continue from their totals, and replicas follow a new placement. Over 20 s: the
    outage lasts half a minute, and the test stops its own Redis, so it needs its own cluster.
    """
    redis = EmbeddedRedis()
    redis.start()
    try:
        served = LocalCluster(tiny("qwen3_moe"), dtype="float32", registry=redis.url)
        async with served as cluster, Client(cluster.address) as client:
            expected = await Streams(client, NEW_TOKENS).finish()
            listed = {replica.id for replica in await cluster.registry.replicas()}
            first, second = cluster.partition
            swapped = {"experts-0": second, "experts-1": first}
            await cluster.until_settled(await cluster.set_placement(swapped))
            ledger = Ledger(cluster.registry)
            assert not (await ledger.read()).stale
            counted = await _rows(cluster)
            streams = Streams(client, NEW_TOKENS)
            await streams.wait_for_tokens(10)
            port = redis.port
            redis.stop()
            outage_end = time.monotonic() + OUTAGE_S
            assert await streams.finish() == expected
            assert OUTAGE_S > TTL_S
            while True:
                assert await Streams(client, NEW_TOKENS).finish() == expected
                reading = await ledger.read()
                decision = decide(reading.snapshot("experts-0", 1, first), State(), Scaling(), 0.0)
                assert (decision.target, decision.reason) == (
                    1,
                    "the registry does not answer, or refuses writes: stay at 1",
                )
                if time.monotonic() > outage_end:
                    break
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
            # The store lost the placement in force.
            restored = Placement(2, {"experts-0": first, "experts-1": second})
            assert await cluster.registry.set_placement(restored)
            await cluster.until_settled(2)
            assert await Streams(client, NEW_TOKENS).finish() == expected
    finally:
        redis.stop()


@pytest.mark.slow
async def test_serving_outlives_a_redis_that_refuses_writes(tiny: Callable[[str], str]) -> None:
    """Tokens stay the same however Redis refuses writes, targets stay, and soon after all services are listed once.

    Over 20 s: each refusal lasts until entries have expired and readers' grace is over.
    """
    assert REFUSED_S > TTL_S + GRACE_S
    with EmbeddedRedis() as server:
        served = LocalCluster(tiny("qwen3_moe"), dtype="float32", registry=server.url)
        async with served as cluster, Client(cluster.address) as client:
            expected = await Streams(client, NEW_TOKENS).finish()
            listed = [replica.id for replica in await cluster.registry.replicas()]
            for how in REFUSALS:
                store, ledger = RefusingRedis(server), Ledger(cluster.registry)
                assert not (await ledger.read()).stale
                store.refuse(how)
                mended_at = time.monotonic() + REFUSED_S
                while time.monotonic() < mended_at:
                    assert await Streams(client, NEW_TOKENS).finish() == expected, how
                    assert (await ledger.read()).snapshot("experts-0", 1, cluster.partition[0]).stale, how
                store.mend()
                async with asyncio.timeout(5):
                    while [replica.id for replica in await cluster.registry.replicas()] != listed:
                        await asyncio.sleep(0.1)
                assert await Streams(client, NEW_TOKENS).finish() == expected
                assert not (await ledger.read()).stale
                store.client.close()
