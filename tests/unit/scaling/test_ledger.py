"""The ledger turns registry entries into the snapshots that the policy decides on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moiety.core.experts import ExpertSet
from moiety.core.load import BatchCost, ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica, ReplicaState, Role
from moiety.errors import WritesRefused
from moiety.registry.memory import MemoryRegistry
from moiety.scaling.ledger import Ledger

HELD = ExpertSet.parse("0:0-1")
OTHER = ExpertSet.parse("0:2-3")
READY = Replica("a", Role.EXPERT, "experts-0", "127.0.0.1:1", "node", "m", "r", held=HELD)


async def _registry(*replicas: Replica) -> MemoryRegistry:
    registry = MemoryRegistry()
    for replica in replicas:
        await registry.register(replica)
    return registry


async def test_only_ready_replicas_of_the_deployment_count() -> None:
    """Draining replicas and those of other groups do not count as live; busy is the mean, queue wait the maximum."""
    registry = await _registry(
        READY,
        replace(READY, id="b"),
        replace(READY, id="c", state=ReplicaState.DRAINING),
        replace(READY, id="d", deployment="experts-1"),
    )
    await registry.publish_load("a", ReplicaLoad(0.2, 5.0, 100.0, 10.0))
    await registry.publish_load("b", ReplicaLoad(0.6, 1.0, 50.0, 10.0))
    await registry.publish_load("c", ReplicaLoad(1.0, 99.0, 50.0, 10.0))
    snapshot = (await Ledger(registry).read()).snapshot("experts-0", 3, HELD)
    assert (snapshot.target, snapshot.live, snapshot.reporting) == (3, 2, 2)
    assert snapshot.busy == pytest.approx(0.4)
    assert (snapshot.queue_wait_ms, snapshot.rows_per_s) == (5.0, 150.0)


async def test_refused_writes_neither_empty_nor_double_a_deployment() -> None:
    """While the store refuses writes, readings are stale; after it, replicas whose entries expired still count, once each."""
    store: dict[str, float | bool] = {"now": 0.0, "refuses": False}

    class Refusing(MemoryRegistry):
        async def check_writes(self) -> None:
            if store["refuses"]:
                raise WritesRefused("OOM")

    registry = Refusing(clock=lambda: store["now"])
    both = READY, replace(READY, id="b")
    for replica in both:
        await registry.register(replica)
    ledger = Ledger(registry)
    assert (await ledger.read()).snapshot("experts-0", 2, HELD).live == 2
    store.update(now=100.0, refuses=True)
    assert (await ledger.read()).snapshot("experts-0", 2, HELD).stale
    store["refuses"] = False
    for beating in (), both[:1], both:  # the heartbeats come back one after the other
        for replica in beating:
            await registry.register(replica)
        snapshot = (await ledger.read()).snapshot("experts-0", 2, HELD)
        assert (snapshot.live, snapshot.stale) == (2, False)


async def test_the_longest_start_is_measured() -> None:
    """A start lasts from a replica's launch to its registration; a replica without a launch time is left out."""
    registry = await _registry(
        READY,
        replace(READY, id="b", launched=100.0, started=280.0),
        replace(READY, id="c", launched=500.0, started=530.0),
        replace(READY, id="d", deployment="experts-1", launched=0.0, started=900.0),
    )
    reading = await Ledger(registry).read()
    assert reading.snapshot("experts-0", 3, HELD).start_s == 180.0
    assert reading.snapshot("experts-1", 3, HELD).start_s == 0.0


async def test_demand_is_what_routers_send_to_the_experts_held() -> None:
    """A group's demand counts only rows for its own experts; the first reading has no rate yet."""
    registry = await _registry()
    ledger = Ledger(registry)
    await registry.publish_load("router", demand=ExpertDemand(((0, 0, 0, 0),), ((0, 0, 0, 0),), time=100.0))
    assert (await ledger.read()).snapshot("experts-0", 0, HELD).rows_per_s == 0
    await registry.publish_load("router", demand=ExpertDemand(((10, 20, 400, 0),), ((1, 1, 1, 0),), time=102.0))
    reading = await ledger.read()
    assert reading.snapshot("experts-0", 0, HELD).rows_per_s == 15.0
    assert reading.snapshot("experts-1", 0, OTHER).rows_per_s == 200.0


async def test_missing_experts_concern_the_groups_that_hold_them() -> None:
    """Waiting for expert 2 concerns only its group; once a placement moves the expert, only the new holder."""
    registry = await _registry()
    await registry.report_missing_experts(0, [2])
    reading = await Ledger(registry).read()
    assert not reading.snapshot("experts-0", 0, HELD).missing_experts
    assert reading.snapshot("experts-1", 0, OTHER).missing_experts
    assert await registry.set_placement(Placement(1, {"experts-0": OTHER, "experts-1": HELD}))
    reading = await Ledger(registry).read()
    assert reading.snapshot("experts-0", 0, HELD).missing_experts
    assert not reading.snapshot("experts-1", 0, OTHER).missing_experts


async def test_a_starting_router_waits_for_every_group() -> None:
    """While a router is starting, every group counts as waited for, because it needs a holder of each expert."""
    router = replace(READY, id="r", role=Role.ROUTER, deployment="router", held=ExpertSet())
    registry = await _registry(replace(router, state=ReplicaState.STARTING))
    assert (await Ledger(registry).read()).snapshot("experts-0", 0, HELD).missing_experts
    await registry.register(router)
    assert not (await Ledger(registry).read()).snapshot("experts-0", 0, HELD).missing_experts


async def test_experts_beyond_the_counters_are_no_error() -> None:
    """Held experts beyond the routers' counters have no rows."""
    registry = await _registry()
    await registry.publish_load("router", demand=ExpertDemand(((1, 1),), ((1, 1),), time=1.0))
    snapshot = (await Ledger(registry).read()).snapshot("experts-0", 0, ExpertSet.parse("0-3:0-9"))
    assert snapshot.rows_per_s == 0


COSTS = BatchCost(fixed_s=0.001, s_per_byte=1e-9, s_per_row=0.0001, expert_bytes=1_000_000, samples=100, error=0.05)


async def test_the_fixed_share_follows_from_the_fit() -> None:
    """Batches of one expert and ten rows cost 1 ms fixed, 1 ms for weights and 1 ms for rows: one third is fixed."""
    registry = await _registry(READY)
    ledger = Ledger(registry)
    await registry.publish_load("router", demand=ExpertDemand(((0, 0, 0, 0),), ((0, 0, 0, 0),), time=100.0))
    await ledger.read()
    await registry.publish_load(
        "router", demand=ExpertDemand(((100, 0, 0, 0),), ((10, 0, 0, 0),), time=101.0, costs=(COSTS,))
    )
    await registry.publish_load("a", ReplicaLoad(0.03, 0.0, rows_per_s=100.0, calls_per_s=10.0))
    snapshot = (await ledger.read()).snapshot("experts-0", 1, HELD)
    assert snapshot.fixed == pytest.approx(1 / 3)


async def test_each_deployment_is_judged_by_the_cost_of_its_kind() -> None:
    """Of two kinds of replicas, a deployment uses the fit of its own; one whose kind has no fit uses the larger fit."""
    registry = await _registry(replace(READY, kind="slow"), replace(READY, id="b", deployment="experts-1", kind="new"))
    ledger = Ledger(registry)
    await registry.publish_load("router", demand=ExpertDemand(((0, 0, 0, 0),), ((0, 0, 0, 0),), time=100.0))
    await ledger.read()
    slow = BatchCost(0.001, 0.0, 0.0, expert_bytes=1_000_000, samples=10, error=0.05, kind="slow")
    demand = ExpertDemand(((100, 0, 0, 0),), ((10, 0, 0, 0),), time=101.0, costs=(slow, replace(COSTS, kind="fast")))
    await registry.publish_load("router", demand=demand)
    for replica in ("a", "b"):
        await registry.publish_load(replica, ReplicaLoad(0.03, 0.0, rows_per_s=100.0, calls_per_s=10.0))
    reading = await ledger.read()
    assert reading.snapshot("experts-0", 1, HELD).fixed == pytest.approx(1.0)
    assert reading.snapshot("experts-1", 1, HELD).fixed == pytest.approx(1 / 3)
    assert reading.costs == replace(COSTS, kind="fast")


async def test_a_hot_set_at_zero_counts_its_share() -> None:
    """One replica of a hot set, beside one of the group, would take half of the cost of its experts; groups count 0."""
    registry = await _registry(READY)
    ledger = Ledger(registry)
    assert await registry.set_placement(Placement(1, {"experts-0": HELD, "hot-0": ExpertSet.parse("0:0")}))
    await registry.publish_load("router", demand=ExpertDemand(((0, 0, 0, 0),), ((0, 0, 0, 0),), time=100.0))
    await ledger.read()
    await registry.publish_load(
        "router", demand=ExpertDemand(((1000, 0, 0, 0),), ((100, 0, 0, 0),), time=101.0, costs=(COSTS,))
    )
    reading = await ledger.read()
    hot = reading.snapshot("hot-0", 0, ExpertSet(), spare=True)
    assert hot.spare
    assert hot.busy_if_added == pytest.approx((0.1 + 0.1 + 0.1) / 2)
    assert reading.snapshot("experts-0", 1, HELD).busy_if_added == 0.0


async def test_a_starting_router_does_not_wait_for_a_hot_set() -> None:
    """A starting router needs the groups, which hold all experts of a hot set."""
    router = replace(READY, id="r", role=Role.ROUTER, deployment="router", held=ExpertSet())
    registry = await _registry(replace(router, state=ReplicaState.STARTING))
    assert not (await Ledger(registry).read()).snapshot("hot-0", 0, HELD, spare=True).missing_experts


async def test_live_settings_are_those_of_the_youngest_replica() -> None:
    """Serve updates replicas one after the other, so the youngest counts; without live replicas the result is None."""
    old = replace(READY, started=1.0, scaling={"target_busy": 0.5})
    registry = await _registry(old, replace(READY, id="b", started=2.0, scaling={"target_busy": 0.8}))
    reading = await Ledger(registry).read()
    assert reading.scaling("experts-0") == {"target_busy": 0.8}
    assert reading.scaling("experts-1") is None
