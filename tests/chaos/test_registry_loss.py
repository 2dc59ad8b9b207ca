"""Redis goes away and comes back: serving goes on with the last table, and the registry fills itself again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from moiety.client import Client
from moiety.load.embedded import EmbeddedRedis
from moiety.load.registry import TTL_S
from moiety.local import LocalCluster
from streams import Streams

NEW_TOKENS = 60


@pytest.mark.slow
def test_serving_outlives_its_registry(tiny: Callable[[str], str]) -> None:
    """Streams run through an outage longer than every TTL with the same tokens; afterwards all replicas are listed again.

    Over 20 s: it stops its own Redis, so it needs a cluster of its own, and waits longer than entries live.
    """

    async def scenario() -> None:
        redis = EmbeddedRedis()
        redis.start()
        try:
            served = LocalCluster(tiny("qwen3_moe"), dtype="float32", registry=redis.url)
            async with served as cluster, Client(cluster.address) as client:
                expected = await Streams(client, NEW_TOKENS).finish()
                listed = {replica.id for replica in await cluster.registry.replicas()}
                streams = Streams(client, NEW_TOKENS)
                await streams.reach(10)
                port = redis.port
                redis.stop()
                assert await streams.finish() == expected
                await asyncio.sleep(TTL_S + 1.0)  # until every entry would have expired
                assert await Streams(client, NEW_TOKENS).finish() == expected
                redis = EmbeddedRedis(port=port)
                redis.start()
                async with asyncio.timeout(15):
                    while {replica.id for replica in await cluster.registry.replicas()} != listed:
                        await asyncio.sleep(0.1)
                assert await Streams(client, NEW_TOKENS).finish() == expected
        finally:
            redis.stop()

    asyncio.run(scenario())
