"""Two systems in one Redis, under one application name: each answers with its own model, whatever the other does or left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from moiety.client import Client
from moiety.core.replica import Role
from moiety.errors import ConfigError
from moiety.local.cluster import LocalCluster
from moiety.registry.embedded_redis import EmbeddedRedis

PROMPT, NEW_TOKENS = [5, 6, 7, 8], 8


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    """The Redis that the systems share."""
    with EmbeddedRedis() as server:
        yield server


async def _greedy(client: Client) -> list[int]:
    stream = client.generate(PROMPT, max_tokens=NEW_TOKENS, ignore_eos=True)
    return [token async for chunk in stream for token in chunk.token_ids]


async def test_two_models_under_one_name_never_mix(
    tiny: Callable[[str], str], redis: EmbeddedRedis, unused_tcp_port: int
) -> None:
    """Clients of each gateway get its model only; a system that wants the other's port is refused before it loads anything.

    Over 20 s on two cores: two systems of four processes start.
    """
    options = {"registry": redis.url, "app": "same", "dtype": "float32"}
    port = unused_tcp_port
    async with LocalCluster(tiny("mixtral"), gateway={"port": port}, **options) as first, Client(first.address) as one:
        alone = await _greedy(one)
        async with LocalCluster(tiny("qwen3_moe"), **options) as second, Client(second.address) as two:
            other = await _greedy(two)
            assert other != alone
            for _ in range(4):
                assert [await _greedy(one), await _greedy(two)] == [alone, other]
            revisions = [(await client.models())[0].revision for client in (one, two)]
            assert revisions == [first.system.revision, second.system.revision]
        third = LocalCluster(tiny("qwen3_moe"), gateway={"port": port}, **options)
        with pytest.raises(ConfigError, match=f"gateway.port = {port}: .* serves model .* of another system, same"):
            await third.__aenter__()
        assert not third.children
        assert await _greedy(one) == alone


@pytest.mark.parametrize(("first", "then"), [(4, 2), pytest.param(2, 4, marks=pytest.mark.slow)])
async def test_a_placement_of_other_groups_is_not_followed(
    tiny: Callable[[str], str], redis: EmbeddedRedis, first: int, then: int
) -> None:
    """Deployed again in the same cluster with another number of groups, each replica holds what its own plan says.

    Over 20 s on two cores: ten processes start.
    """
    options = {"registry": redis.url, "app": f"regrouped-{first}", "cluster": "one", "dtype": "float32"}
    async with LocalCluster(tiny("mixtral"), groups=first, **options) as cluster, Client(cluster.address) as client:
        expected = await _greedy(client)
        turned = {f"experts-{group}": cluster.partition[(group + 1) % first] for group in range(first)}
        await cluster.until_settled(await cluster.set_placement(turned))
    async with LocalCluster(tiny("mixtral"), groups=then, **options) as cluster, Client(cluster.address) as client:
        held = {one.deployment: one.held for one in await cluster.registry.replicas() if one.role is Role.EXPERT}
        assert held == {f"experts-{group}": cluster.partition[group] for group in range(then)}
        assert await asyncio.wait_for(_greedy(client), 10) == expected
