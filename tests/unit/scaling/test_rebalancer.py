"""The rebalancer sets a default placement, sets it again after a loss, and changes it only if the gain is large enough."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

import pytest

from moiety.core.experts import ExpertSet
from moiety.core.load import BatchCost, ExpertDemand
from moiety.core.replica import Placement, Replica, Role
from moiety.errors import FailedPrecondition, Unavailable, WritesRefused
from moiety.registry.memory import MemoryRegistry
from moiety.scaling.ledger import Ledger
from moiety.scaling.rebalancer import EVERY_S, Rebalancer
from moiety.tools.rebalance import RebalanceRequest, apply_placement, propose_placement

COSTS = BatchCost(fixed_s=0.0, s_per_byte=1e-9, s_per_row=1e-5, expert_bytes=1_000_000, samples=100, error=0.05)
DEFAULT = {"experts-0": ExpertSet.parse("0:0-1"), "experts-1": ExpertSet.parse("0:2-3"), "hot-0": ExpertSet()}
MOVED = {**DEFAULT, "experts-0": DEFAULT["experts-1"], "experts-1": DEFAULT["experts-0"]}
SKEWED = (1000, 900, 10, 10)  # rows per second; both hot experts are in one group
EVEN = (500, 500, 500, 500)


def replica_of(deployment: str, held: ExpertSet, epoch: int) -> Replica:
    """A ready replica that has followed the placement of `epoch`."""
    return Replica(f"{deployment}#1", Role.EXPERT, deployment, "h:1", "n", "m", "r", held=held, placement_epoch=epoch)


GATEWAY = Replica("gateway#1", Role.GATEWAY, "gateway", "h:2", "n", "m", "r")


class System:
    """A registry, and readings of it one second apart."""

    def __init__(
        self, gain: float | None = 0.1, hot_memory: int = 1_000_000, registry: MemoryRegistry | None = None
    ) -> None:
        self.registry = registry or MemoryRegistry(clock=lambda: 0.0)
        self.ledger = Ledger(self.registry)
        self.rebalancer = Rebalancer(self.registry, gain, hot_memory)
        self.now, self._rows = 0.0, [0, 0, 0, 0]

    async def follow(self, rows: tuple[int, ...], default: Mapping[str, ExpertSet] | None = DEFAULT) -> None:
        """Adds one second of this load and runs one round of the rebalancer."""
        self.now += 1.0
        self._rows = [old + new for old, new in zip(self._rows, rows, strict=True)]
        counts = (tuple(self._rows),)
        await self.registry.register(GATEWAY)
        await self.registry.publish_load("router", demand=ExpertDemand(counts, counts, time=self.now, costs=(COSTS,)))
        await self.rebalancer.follow(await self.ledger.read(), default, self.now)

    async def settle(self) -> None:
        """Registers replicas of all groups that have followed the placement in force."""
        placement = await self.registry.placement()
        assert placement is not None
        for name in ("experts-0", "experts-1"):
            await self.registry.register(replica_of(name, placement.held[name], placement.epoch))


async def test_the_default_placement_is_set_and_set_again() -> None:
    """The default is set if there was no placement; after a loss, the last one is set again with its old epoch."""
    system = System()
    await system.follow(EVEN, None)
    assert await system.registry.placement() is None  # not all deployments are known yet
    await system.follow(EVEN)
    assert await system.registry.placement() == Placement(1, DEFAULT)
    assert await system.registry.set_placement(Placement(2, MOVED))
    await system.follow(EVEN)
    system.registry.clear()
    await system.registry.register(replica_of("experts-0", MOVED["experts-0"], 2))
    await system.follow(EVEN)
    assert await system.registry.placement() == Placement(2, MOVED)


async def test_a_system_that_has_ended_gets_no_placement() -> None:
    """While no service is live, a placement that is gone is not set again: the end of a system deletes it."""
    system = System()
    await system.follow(EVEN)
    reading = await system.ledger.read()
    await system.registry.deregister(GATEWAY.id)
    assert await system.registry.forget()
    await system.rebalancer.follow(replace(reading, placement=None), DEFAULT, 2.0)
    assert await system.registry.placement() is None


async def lose_a_newer_placement(system: System, *followers: str) -> None:
    """Another process sets placement 2, which `followers` follow, and the store is emptied before the rebalancer reads it."""
    await system.follow(EVEN)
    await system.settle()
    system.registry.clear()
    for name in ("experts-0", "experts-1"):
        held, epoch = (MOVED, 2) if name in followers else (DEFAULT, 1)
        await system.registry.register(replica_of(name, held[name], epoch))
    await system.follow(EVEN)


async def test_a_newer_placement_is_restored_from_the_replicas() -> None:
    """An epoch never stands for other experts than those that its followers hold."""
    system = System()
    await lose_a_newer_placement(system, "experts-0", "experts-1")
    assert await system.registry.placement() == Placement(2, MOVED)


async def test_a_newer_placement_that_few_follow_is_taken_back() -> None:
    """If the followers of a lost placement do not hold all experts, all replicas return to the last known placement."""
    system = System()
    await lose_a_newer_placement(system, "experts-0")
    assert await system.registry.placement() == Placement(3, DEFAULT)


async def test_nothing_is_decided_or_set_while_writes_are_refused() -> None:
    """A store that refuses writes gives no reading to decide on, and the placement is neither changed nor set again."""

    class Refusing(MemoryRegistry):
        async def check_writes(self) -> None:
            raise WritesRefused("OOM")

        async def set_placement(self, placement: Placement) -> bool:
            raise AssertionError("set while writes are refused")

    system = System(registry=Refusing(clock=lambda: 0.0))
    for name in ("experts-0", "experts-1"):
        await system.registry.register(replica_of(name, DEFAULT[name], 1))
    for _ in range(int(2 * EVERY_S)):
        await system.follow(SKEWED)
    reading = await system.ledger.read()
    assert reading.stale
    assert reading.snapshot("experts-0", 3, DEFAULT["experts-0"]).stale


async def test_skew_changes_the_placement_and_says_why() -> None:
    """If one group has both hot experts, a hot set gets one of them, and the decision names the gain."""
    system = System()
    await system.follow(EVEN)
    await system.settle()
    for _ in range(int(2 * EVERY_S)):
        await system.follow(SKEWED)
    placement = await system.registry.placement()
    assert placement is not None
    assert placement.epoch == 2
    holders = [sum((0, expert) in held for held in placement.held.values()) for expert in range(4)]
    assert min(holders) == 1
    assert len(placement.held["hot-0"]) == 1
    assert placement.held["hot-0"].layer(0) <= {0, 1}
    (decision,) = await system.registry.decisions()
    assert (decision["deployment"], decision["from"], decision["to"]) == ("placement", 1, 2)
    assert "gain" in decision["reason"]


@pytest.mark.parametrize("reason", ["even", "under way", "off"])
async def test_the_placement_stays(reason: str) -> None:
    """The placement stays if load is even, if a change is under way, or if rebalancing is off."""
    system = System(gain=None if reason == "off" else 0.5)
    await system.follow(EVEN)
    await system.settle()
    if reason == "under way":
        await system.registry.register(replica_of("experts-1", ExpertSet(), 0))
    for _ in range(int(3 * EVERY_S)):
        await system.follow(EVEN if reason == "even" else SKEWED)
    assert await system.registry.placement() == Placement(1, DEFAULT)
    assert not await system.registry.decisions()


async def test_the_command_plans_from_the_load_and_enacts_once() -> None:
    """`moiety rebalance` finds a gain; of two plans made at once, the second is refused with "plan again"."""
    system = System(gain=None)
    for name, held in DEFAULT.items():
        if len(held):
            await system.registry.register(replica_of(name, held, 0))
    serving = asyncio.create_task(_serve(system))
    found = await propose_placement(system.registry, RebalanceRequest(watch_s=3.0, hot_sets=1, hot_memory=1_000_000))
    serving.cancel()
    assert found.gain > 0.2
    assert any(line.startswith("  + 0:") for line in found.lines())
    with pytest.raises(Unavailable, match="placement 1 is not in force everywhere"):
        await apply_placement(system.registry, found, 0.3, lambda _: None)
    with pytest.raises(FailedPrecondition, match="plan again"):
        await apply_placement(system.registry, replace(found), 0.3, lambda _: None)


async def test_without_load_there_is_nothing_to_plan_for() -> None:
    """A system without load gets no plan, and the error says so."""
    system = System()
    await system.registry.register(replica_of("experts-0", DEFAULT["experts-0"], 0))
    with pytest.raises(FailedPrecondition, match="no load to plan for"):
        await propose_placement(system.registry, RebalanceRequest(watch_s=0.1))


async def _serve(system: System) -> None:
    while True:
        await system.follow(SKEWED, None)
        await asyncio.sleep(0.3)
