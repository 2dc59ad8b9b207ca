"""What every registry must do: the same tests on the in-memory registry and on a real Redis."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from registry_support import demand_of, expert_replica

from moiety.core.experts import ExpertSet
from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, ReplicaState, Role
from moiety.registry.interface import DECISIONS_KEPT, Registry


async def test_a_registered_replica_is_read_back_whole(registry: Registry) -> None:
    """Every field of a replica survives the store."""
    replica = expert_replica(state=ReplicaState.DRAINING)
    await registry.register(replica)
    assert await registry.replicas() == (replica,)


async def test_replicas_are_sorted_and_the_last_registration_counts(registry: Registry) -> None:
    """Replicas are ordered by id, not by arrival, and a heartbeat replaces the entry."""
    first, second = expert_replica("b"), expert_replica("a", role=Role.ROUTER, held=ExpertSet())
    await registry.register(first)
    await registry.register(second)
    moved = expert_replica("b", held=ExpertSet.uniform(1, [7]), placement_epoch=3)
    await registry.register(moved)
    assert await registry.replicas() == (second, moved)


async def test_a_reader_follows_every_change(registry: Registry) -> None:
    """A reading after each write shows that write: a change and its reversal, a removal and a return, one among others."""
    ready, draining, other = expert_replica(), expert_replica(state=ReplicaState.DRAINING), expert_replica("e1")
    await registry.register(other)
    for replica in (ready, ready, draining, ready):
        await registry.register(replica)
        assert await registry.replicas() == (replica, other)
    await registry.deregister("e0")
    assert await registry.replicas() == (other,)
    await registry.register(ready)
    assert await registry.replicas() == (ready, other)


async def test_a_deregistered_replica_is_gone_at_once(registry: Registry) -> None:
    """Deregistering takes effect before the TTL, and a second call is harmless."""
    await registry.register(expert_replica())
    await registry.deregister("e0")
    await registry.deregister("e0")
    assert await registry.replicas() == ()


async def test_a_generation_begins_with_the_first_registration_and_stays(registry: Registry) -> None:
    """An empty store has no generation; a filled one keeps its generation even when the last replica leaves."""
    assert await registry.generation() is None
    await registry.register(expert_replica())
    generation = await registry.generation()
    assert generation is not None
    await registry.register(expert_replica("e1"))
    await registry.deregister("e0")
    await registry.deregister("e1")
    assert await registry.generation() == generation


async def test_routers_are_listed_alone(registry: Registry) -> None:
    """`routers` lists the routers as they last registered, until they deregister."""
    router = replace(expert_replica(id="r"), role=Role.ROUTER, held=ExpertSet())
    await registry.register(expert_replica(id="a"))
    await registry.register(router)
    await registry.register(acknowledged := replace(router, placement_epoch=4))
    assert await registry.routers() == (acknowledged,)
    await registry.deregister("r")
    assert not await registry.routers()


async def test_a_placement_needs_the_next_epoch(registry: Registry) -> None:
    """Only the epoch after the one in force is stored; with none in force, any epoch: the store may have been emptied."""

    def placement(epoch: int) -> Placement:
        return Placement(epoch, {"experts-0": ExpertSet.uniform(2, range(epoch)), "hot-0": ExpertSet()})

    assert await registry.placement() is None
    assert await registry.placement_epoch() == 0
    assert await registry.set_placement(placement(7))
    assert not await registry.set_placement(placement(1))
    assert not await registry.set_placement(placement(7))
    assert not await registry.set_placement(placement(9))
    assert await registry.set_placement(placement(8))
    assert await registry.placement() == placement(8)
    assert await registry.placement_epoch() == 8


async def test_one_of_several_racing_placements_wins(registry: Registry) -> None:
    """If eight writers propose the same epoch at once, exactly one call returns True."""
    proposals = [Placement(1, {f"experts-{writer}": ExpertSet.uniform(1, [writer])}) for writer in range(8)]
    stored = await asyncio.gather(*(registry.set_placement(proposal) for proposal in proposals))
    assert stored.count(True) == 1
    assert await registry.placement() == proposals[stored.index(True)]


async def test_counters_are_exact_through_repeated_flushes(registry: Registry) -> None:
    """A flush sent three times counts once per writer, up to the largest 64-bit counts."""
    huge = ExpertDemand(
        rows=((1, 2**63 - 1), (0, 4)), activations=((1, 2), (0, 3)), time=1700000000.123456, started=5.5
    )
    other = demand_of((7, 0), (0, 0), time=3.0)
    for _ in range(3):
        await registry.publish_load("router-a", demand=huge)
    await registry.publish_load("router-b", demand=other)
    assert await registry.expert_demand() == {"router-a": huge, "router-b": other}


async def test_a_restarted_writer_has_new_counters(registry: Registry) -> None:
    """A router's new id neither adds to nor replaces the counters of its old id; a flush replaces only its own counters."""
    await registry.publish_load("router-a1", demand=demand_of((5, 5)))
    await registry.publish_load("router-a2", demand=demand_of((1, 0)))
    assert await registry.expert_demand() == {"router-a1": demand_of((5, 5)), "router-a2": demand_of((1, 0))}
    await registry.publish_load("router-a2", demand=demand_of((1, 2)))
    assert await registry.expert_demand() == {"router-a1": demand_of((5, 5)), "router-a2": demand_of((1, 2))}


async def test_the_last_load_report_counts(registry: Registry) -> None:
    """Only the newest load report of each replica is kept."""
    await registry.publish_load("e0", ReplicaLoad(0.1, 1.0, 10.0, 2.0))
    await registry.publish_load("e0", ReplicaLoad(0.9, 30.5, 100.0, 20.0))
    await registry.publish_load("e1", ReplicaLoad(0.0, 0.0, 0.0, 0.0))
    assert await registry.replica_load() == {
        "e0": ReplicaLoad(0.9, 30.5, 100.0, 20.0),
        "e1": ReplicaLoad(0.0, 0.0, 0.0, 0.0),
    }


async def test_a_router_reports_load_and_counters_at_once(registry: Registry) -> None:
    """One call stores a router's load and its counters under the same id."""
    await registry.publish_load("r0", ReplicaLoad(0.1, 1.0, 10.0, 2.0), demand_of((1, 2)))
    assert await registry.replica_load() == {"r0": ReplicaLoad(0.1, 1.0, 10.0, 2.0)}
    assert await registry.expert_demand() == {"r0": demand_of((1, 2))}


async def test_missing_experts_of_all_routers_are_joined(registry: Registry) -> None:
    """Missing experts are the union per layer; a report of no experts records none."""
    assert await registry.missing_experts() == {}
    await registry.report_missing_experts(0, [1, 2])
    await registry.report_missing_experts(0, [2, 3])
    await registry.report_missing_experts(11, [40])
    await registry.report_missing_experts(5, [])
    assert await registry.missing_experts() == {0: frozenset({1, 2, 3}), 11: frozenset({40})}


async def test_decisions_come_back_oldest_first(registry: Registry) -> None:
    """The newest `count` decisions are returned in order, with the types of their values."""
    assert await registry.decisions() == []
    for number in range(5):
        await registry.record_decision({"group": f"experts-{number}", "target": number, "why": {"busy": 0.5}})
    assert [decision["target"] for decision in await registry.decisions(3)] == [2, 3, 4]
    assert (await registry.decisions())[0] == {"group": "experts-0", "target": 0, "why": {"busy": 0.5}}


async def test_the_log_of_decisions_is_bounded(registry: Registry) -> None:
    """Beyond its bound the log drops the oldest decisions."""
    for start in range(0, DECISIONS_KEPT + 20, 60):
        await asyncio.gather(*(registry.record_decision({"number": start + n}) for n in range(60)))
    kept = await registry.decisions(count=2 * DECISIONS_KEPT)
    assert len(kept) == DECISIONS_KEPT
    # The first 60 are concurrent, so their order is open; none of the later ones may be missing.
    assert {decision["number"] for decision in kept} >= set(range(60, DECISIONS_KEPT + 20))


async def test_a_system_that_was_ended_is_forgotten(registry: Registry) -> None:
    """`forget` does nothing while a replica is live; then it deletes placement, load and decisions."""
    await registry.register(expert_replica())
    await registry.set_placement(Placement(1, {"experts-0": ExpertSet.uniform(1, [0])}))
    await registry.publish_load("e0", ReplicaLoad(0.5, 1.0, 2.0, 3.0), demand_of((1, 2)))
    await registry.record_decision({"deployment": "experts-0"})
    assert not await registry.forget()
    assert await registry.placement() is not None
    await registry.deregister("e0")
    assert await registry.forget()
    assert await registry.placement() is None
    assert (await registry.decisions(), await registry.replica_load(), await registry.expert_demand()) == ([], {}, {})
    assert await registry.generation() is None
