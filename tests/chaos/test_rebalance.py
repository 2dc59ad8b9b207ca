"""Placements change under eight streams: every stream ends with the tokens of a run without changes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from chaos_support import NEW_TOKENS, STRIKE_AT, assert_serves_on

from moiety.bench.report import percentile
from moiety.client import Client
from moiety.core.experts import ExpertSet
from moiety.errors import Unavailable
from moiety.tools.rebalance import RebalanceRequest, apply_placement, propose_placement
from support.serving import Served
from support.streams import Streams


async def change(served: Served, client: Client, held: Mapping[str, ExpertSet]) -> Streams:
    """Starts streams and puts `held` in force while they run; returns them once all replicas have followed."""
    streams = Streams(client, NEW_TOKENS)
    await streams.wait_for_tokens(STRIKE_AT)
    await served.cluster.until_settled(await served.cluster.set_placement(held))
    return streams


async def holdings(served: Served) -> dict[str, ExpertSet]:
    """Returns deployment -> the experts that its replica holds."""
    return {r.deployment: r.held for r in await served.cluster.registry.replicas() if r.role == "expert"}


def test_experts_change_places_under_a_running_router(served: Served, expected: list[list[int]]) -> None:
    """Two groups swap all their experts: tokens and processes stay the same, and no call is refused."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        first, second = served.cluster.partition
        pids = {child.pid for child in served.cluster.children}
        served.receiver.clear()
        for held in ({"experts-0": second, "experts-1": first}, {"experts-0": first, "experts-1": second}):
            streams = await change(served, client, held)
            assert await streams.finish() == expected
            assert await holdings(served) == held
            print(f"worst token gap during a swap of all experts: {streams.worst_gap:.3f} s")
        assert {child.pid for child in served.cluster.children} == pids

    served.run(scenario)
    hops = [span for span in served.receiver.spans() if span.name == "hop"]
    assert hops
    assert {span.attributes.get("moiety.outcome") for span in hops} == {None}


def test_a_hot_set_takes_over_hot_experts_and_gives_them_back(served: Served, expected: list[list[int]]) -> None:
    """A hot set shares the rows of some experts, then of others, then of none; tokens stay the same."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        first, second = served.cluster.partition
        groups = {"experts-0": first, "experts-1": second}
        hot = await served.cluster.add_hot_set(0)
        try:
            for text in ("0:0,1;1:2", "0:5;1:0-2", ""):
                held = {**groups, "hot-0": ExpertSet.parse(text)}
                assert await (await change(served, client, held)).finish() == expected
                assert await holdings(served) == held
                rows = (await served.cluster.registry.replica_load())[hot.replica.id].rows_per_s
                served.receiver.clear()
                await assert_serves_on(client, expected)
                called = set[object]()
                async with asyncio.timeout(10):  # spans are exported in batches
                    while not called or (text and "hot-0" not in called):
                        await asyncio.sleep(0.05)
                        hops = [span for span in served.receiver.spans() if span.name == "hop"]
                        called = {span.attributes.get("moiety.deployment") for span in hops}
                assert ("hot-0" in called) == bool(text), rows
            # Every expert keeps a holder when the hot set drains: the groups have held all of theirs throughout.
            await served.cluster.drain(hot)
            await assert_serves_on(client, expected)
        finally:
            if hot in served.cluster.children:
                await served.cluster.drain(hot)

    served.run(scenario)


def test_an_expert_missing_from_the_placement_is_not_lost(served: Served, expected: list[list[int]]) -> None:
    """A placement without some expert leaves that expert with its last holder, and requests go on."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        first, second = served.cluster.partition
        incomplete = {"experts-0": first - ExpertSet.parse("0:0"), "experts-1": second}
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        epoch = await served.cluster.set_placement(incomplete)
        assert await streams.finish() == expected
        with pytest.raises(Unavailable, match="leaving 0:0"):
            await served.cluster.until_settled(epoch, timeout_s=3.0)
        await assert_serves_on(client, expected)
        await served.cluster.until_settled(
            await served.cluster.set_placement({"experts-0": first, "experts-1": second})
        )

    served.run(scenario)


@pytest.mark.slow
def test_a_plan_from_the_ledger_is_enacted_under_load(served: Served, expected: list[list[int]]) -> None:
    """`moiety rebalance` plans a hot set from the streams' load and enacts it while they run; tokens stay the same.

    Over 20 s: it watches the load for four seconds and keeps streams running throughout.
    """

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        hot = await served.cluster.add_hot_set(0)
        registry = served.cluster.registry
        gaps: list[float] = []
        done = asyncio.Event()

        async def load() -> None:
            while not done.is_set():
                streams = Streams(client, NEW_TOKENS)
                assert await streams.finish() == expected
                gaps.extend(b - a for s in streams.streams for a, b in zip(s.times, s.times[1:], strict=False))

        running = asyncio.create_task(load())
        try:
            plan = await propose_placement(registry, RebalanceRequest(watch_s=4.0, hot_sets=1, hot_memory=1 << 20))
            assert plan.changes
            count_before = len(gaps)
            await apply_placement(registry, plan, 30.0, print)
            before, after = gaps[:count_before], gaps[count_before:]
        finally:
            done.set()
            await running
        assert (await holdings(served))["hot-0"] == plan.placement.held["hot-0"]
        assert len(plan.placement.held["hot-0"]) > 0
        for line in plan.lines():
            print(line)
        if before and after:
            print(
                f"ITL p99: {1000 * percentile(before, 99):.0f} ms before, {1000 * percentile(after, 99):.0f} ms during"
            )
        first, second = served.cluster.partition
        await served.cluster.until_settled(
            await served.cluster.set_placement({"experts-0": first, "experts-1": second})
        )
        await served.cluster.drain(hot)

    served.run(scenario)
