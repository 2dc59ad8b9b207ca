"""The overflow policy: rows of an overloaded expert wait by default; under `backup` other experts compute some of them."""

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
    """Returns one stream's tokens, and the fraction of its rows that other experts computed."""
    prompt, tokens, rerouted = [3 + 7 * number, 11, 19 + number], [], 0.0
    async for chunk in client.generate(prompt, max_tokens=NEW_TOKENS, ignore_eos=True):
        tokens += chunk.token_ids
        rerouted = max(rerouted, chunk.rerouted)
    return tokens, rerouted


async def generate_all(client: Client) -> list[tuple[list[int], float]]:
    """Runs all streams at once."""
    return await asyncio.gather(*(generate(client, number) for number in range(STREAMS)))


async def answers(address: str) -> tuple[list[list[int]], list[float]]:
    """Returns the tokens of all streams, and their rerouted fractions."""
    async with Client(address) as client:
        done = await generate_all(client)
    return [tokens for tokens, _ in done], [rerouted for _, rerouted in done]


@pytest.mark.slow
async def test_backup_reroutes_under_load_and_reports_it(tiny: Callable[[str], str], served: Served) -> None:
    """Under `backup` a slow group's rows go to other experts, as usage and metrics report; without load, tokens are exact.

    Over 20 s: it starts its own cluster, with a slow group.
    """
    async with Client(served.cluster.address) as client:
        expected, _ = await generate(client, 0)
    with TraceReceiver() as receiver:
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
            tokens, fractions = await answers(cluster.address)
            assert all(len(each) == NEW_TOKENS for each in tokens)
            assert 0.0 < max(fractions) < 1.0
            print(f"rerouted: {fractions}")
        rows = {figure.name: figure.value for figure in receiver.metrics() if figure.cumulative}
    assert 0 < rows[MetricName.REROUTED_ROWS] < rows[MetricName.ROUTED_ROWS]


@pytest.mark.slow
async def test_rows_wait_by_default(tiny: Callable[[str], str], served: Served) -> None:
    """Under the default policy `wait` slow groups give the tokens of fast ones, and no row is rerouted.

    Over 20 s: it starts its own cluster, with slow groups.
    """
    expected, _ = await answers(served.cluster.address)
    async with LocalCluster(tiny("qwen3_moe"), dtype="float32", expert={"capacity": 400.0}) as cluster:
        tokens, fractions = await answers(cluster.address)
    assert set(fractions) == {0.0}
    assert tokens == expected
