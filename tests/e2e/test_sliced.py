"""Experts in slices, each slice in its own group, give the tokens of whole experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moiety.client import Client
from moiety.local.cluster import LocalCluster
from support.serving import Served
from support.streams import Streams

NEW_TOKENS = 40


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "groups"), [("float32", 4), ("bfloat16", 2)])
async def test_slices_serve_the_tokens_of_whole_experts(
    served: Served, tiny: Callable[[str], str], dtype: str, groups: int
) -> None:
    """Through a kill -9 of a slice's only holder float32 keeps every token; bfloat16 is only close, and completes.

    Over 20 s: each of the two cases starts its own cluster.
    """
    sliced = LocalCluster(tiny("qwen3_moe"), dtype=dtype, groups=groups, slices=2)
    async with sliced as cluster, Client(cluster.address) as client:
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(10)
        lost = cluster.experts(1)[0]
        lost.signal(9)
        await cluster.add_expert(1)
        tokens = await streams.finish()
        await lost.ended()
        assert await Streams(client, NEW_TOKENS).finish() == tokens or dtype != "float32"
    assert all(len(stream) == NEW_TOKENS for stream in tokens)
    if dtype == "float32":
        async with Client(served.cluster.address) as client:
            assert tokens == await Streams(client, NEW_TOKENS).finish()
