"""The overflow policy: rows wait for an overrun expert unless it is told otherwise, and who told it is told how often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from moiety.client import Client
from moiety.local.cluster import LocalCluster
from moiety.telemetry import MetricName
from moiety.tools.trace.receiver import TraceReceiver
from support.serving import Served

NEW_TOKENS = 24
STREAMS = 6


async def generate(client: Client, number: int) -> tuple[list[int], float]:
    """A stream's tokens and the fraction of its rows that other experts computed."""
    prompt, tokens, rerouted = [3 + 7 * number, 11, 19 + number], [], 0.0
    async for chunk in client.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True):
        tokens += chunk.token_ids
        rerouted = max(rerouted, chunk.rerouted)
    return tokens, rerouted


async def together(client: Client) -> list[tuple[list[int], float]]:
    """All streams at once."""
    return await asyncio.gather(*(generate(client, number) for number in range(STREAMS)))


async def answers(cluster: LocalCluster) -> tuple[list[list[int]], list[float]]:
    """Of all streams: tokens, and fractions."""
    async with Client(cluster.address) as client:
        done = await together(client)
    return [tokens for tokens, _ in done], [rerouted for _, rerouted in done]


@pytest.mark.slow
def test_backup_reroutes_under_load_and_says_so(tiny: Callable[[str], str], served: Served) -> None:
    """One group paced below the load: where it says backup its rows go elsewhere, told in usage and metrics; in calm, exact.

    Over 20 s: a cluster of its own, with a slow group.
    """

    expected = served.run(lambda client: generate(client, 0))[0]

    async def scenario() -> None:
        router = {"overflow_groups": {"experts-0": "backup"}, "overflow_queue_ms": 5.0, "lanes": 2}
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_TRACES_EXPORTER": "none"}
        async with LocalCluster(tiny("qwen3_moe"), dtype="float32", router=router, env=env) as cluster:
            async with Client(cluster.address) as client:
                calm, rerouted = await generate(client, 0)
                assert rerouted == 0.0
                assert calm == expected
            (fast,) = cluster.experts(0)
            await cluster.add_expert(0, capacity=400.0)
            await cluster.drain(fast)
            tokens, fractions = await answers(cluster)
            assert all(len(each) == NEW_TOKENS for each in tokens)
            assert 0.0 < max(fractions) < 1.0
            print(f"rerouted: {fractions}")

    with TraceReceiver() as receiver:
        asyncio.run(scenario())
        rows = {figure.name: figure.value for figure in receiver.figures() if figure.cumulative}
    assert 0 < rows[MetricName.REROUTED_ROWS] < rows[MetricName.ROUTED_ROWS]


@pytest.mark.slow
def test_rows_wait_by_default(tiny: Callable[[str], str], served: Served) -> None:
    """The same slow group under the policy `wait`: the tokens are those of a fast one, and nothing was rerouted.

    Over 20 s: a cluster of its own, with a slow group.
    """

    async def scenario() -> None:
        async with LocalCluster(tiny("qwen3_moe"), dtype="float32", expert={"capacity": 400.0}) as cluster:
            tokens, fractions = await answers(cluster)
            assert set(fractions) == {0.0}
            assert tokens == expected

    expected = [tokens for tokens, _ in served.run(together)]
    asyncio.run(scenario())
