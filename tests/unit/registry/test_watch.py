"""The replica table distinguishes three kinds of loss; only one of them removes a replica."""

from __future__ import annotations

import asyncio

import pytest
from registry_support import eventually, expert_replica

from moiety.core.replica import Replica
from moiety.errors import RegistryUnreachable
from moiety.registry.memory import MemoryRegistry
from moiety.registry.watch import GRACE_S, Watch


class Switchable(MemoryRegistry):
    """A registry that a test can make unreachable, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reachable = True
        super().__init__(lambda: self.now)

    async def replicas(self) -> tuple[Replica, ...]:
        if not self.reachable:
            raise RegistryUnreachable("cut off")
        return await super().replicas()

    async def beat(self, *ids: str) -> None:
        for replica_id in ids:
            await self.register(expert_replica(replica_id))


@pytest.fixture
def registry() -> Switchable:
    """An empty registry."""
    return Switchable()


@pytest.fixture
def watch(registry: Switchable) -> Watch:
    """A watch with the registry's clock; it polls only when `poll` is called."""
    return Watch(registry, clock=lambda: registry.now)


def ids(watch: Watch) -> str:
    """Returns the ids of the table's replicas, in its order."""
    return " ".join(replica.id for replica in watch.replicas)


async def test_an_expired_entry_leaves_the_table(registry: Switchable, watch: Watch) -> None:
    """A replica that stops beating leaves the table; the others stay."""
    await registry.beat("a", "b")
    await watch.poll()
    assert ids(watch) == "a b"
    registry.now += 2
    await registry.beat("a")
    registry.now += 2
    await watch.poll()
    assert ids(watch) == "a"
    await registry.deregister("a")
    await watch.poll()
    assert ids(watch) == ""


async def test_an_outage_keeps_the_table_and_sets_stale_since(registry: Switchable, watch: Watch) -> None:
    """While the registry is unreachable, the last table stays and `stale_since` names the start."""
    await registry.beat("a", "b")
    await watch.poll()
    registry.reachable = False
    for _ in range(3):
        registry.now += 60
        await watch.poll()
    assert ids(watch) == "a b"
    assert watch.stale_since == 160.0
    registry.reachable = True
    await watch.poll()
    assert watch.stale_since is None


async def test_entries_that_expired_during_an_outage_may_come_back(registry: Switchable, watch: Watch) -> None:
    """After an outage, in which no replica could beat, replicas leave only after the grace period."""
    await registry.beat("a", "b")
    await watch.poll()
    registry.reachable = False
    registry.now += 60
    await watch.poll()
    registry.reachable = True
    await watch.poll()
    assert ids(watch) == "a b"
    for _ in range(5):
        registry.now += GRACE_S / 5
        await registry.beat("a")
        await watch.poll()
    assert ids(watch) == "a"


async def test_an_emptied_store_refills_without_a_loss(registry: Switchable, watch: Watch) -> None:
    """After a flush no replica leaves the table while heartbeats refill the store; new replicas join at once."""
    await registry.beat("a", "b", "c")
    await watch.poll()
    registry.clear()
    await watch.poll()
    assert ids(watch) == "a b c"
    await registry.beat("b", "d")
    await watch.poll()
    assert ids(watch) == "a b c d"
    registry.now += GRACE_S - 2
    await registry.beat("a", "b", "d")
    await watch.poll()
    assert ids(watch) == "a b c d"
    registry.now += 2
    await watch.poll()
    assert ids(watch) == "a b d"


async def test_a_store_half_refilled_between_two_polls_loses_no_replica(registry: Switchable, watch: Watch) -> None:
    """A new generation starts the grace period, even if no poll found the store empty."""
    await registry.beat("a", "b")
    await watch.poll()
    registry.clear()
    await registry.beat("a")
    await watch.poll()
    assert ids(watch) == "a b"


async def test_a_replica_that_refilled_and_left_is_not_kept(registry: Switchable, watch: Watch) -> None:
    """The grace period covers only entries not listed since the store was emptied."""
    await registry.beat("a", "b")
    await watch.poll()
    registry.clear()
    await registry.beat("a", "b")
    await watch.poll()
    await registry.deregister("a")
    await watch.poll()
    assert ids(watch) == "b"


async def test_a_loss_of_most_entries_at_once_is_doubted(registry: Switchable, watch: Watch) -> None:
    """Replicas that vanish together stay until they had time to register again; one that vanishes alone leaves at once."""
    await registry.beat("a", "b", "c")
    await watch.poll()
    await registry.deregister("a")
    await registry.deregister("b")
    await watch.poll()
    assert ids(watch) == "a b c"
    await registry.beat("b", "c")
    registry.now += GRACE_S / 2
    await registry.beat("b", "c")
    await watch.poll()
    assert ids(watch) == "a b c"
    registry.now += GRACE_S / 2
    await registry.beat("b", "c")
    await watch.poll()
    assert ids(watch) == "b c"
    await registry.deregister("b")
    await watch.poll()
    assert ids(watch) == "c"


async def test_changes_reach_the_callback_and_waiters() -> None:
    """The callback gets the whole table at each change and only then; if it fails, the watch continues."""
    tables: list[str] = []

    async def on_change(replicas: tuple[Replica, ...]) -> None:
        tables.append(" ".join(replica.id for replica in replicas))
        if len(tables) == 1:
            raise RuntimeError("a follower's bug")

    registry = MemoryRegistry()
    await registry.register(expert_replica("a"))
    watch = Watch(registry, interval_s=0.01, on_change=on_change)
    await watch.start()
    assert ids(watch) == "a", "the first table is there when start returns"
    waiting = asyncio.create_task(watch.until(lambda replicas: len(replicas) == 2))
    await registry.register(expert_replica("b"))
    async with asyncio.timeout(5):
        assert [replica.id for replica in await waiting] == ["a", "b"]
    await registry.deregister("a")

    async def followed() -> bool:
        return ids(watch) == "b"

    await eventually(followed)
    await watch.stop()
    assert tables == ["a", "a b", "b"]


async def test_a_watch_starts_without_a_registry() -> None:
    """A watch starts before its registry: the table is empty and stale until the registry answers."""
    registry = Switchable()
    registry.reachable = False
    watch = Watch(registry, interval_s=0.01)
    await watch.start()
    assert watch.replicas == ()
    assert watch.stale_since is not None
    await registry.beat("a")
    registry.reachable = True
    async with asyncio.timeout(5):
        await watch.until(bool)
    assert watch.stale_since is None
    await watch.stop()
