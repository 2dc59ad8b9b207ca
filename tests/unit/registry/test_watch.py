"""The replica table distinguishes three kinds of loss; only one of them removes a replica."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

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


def check(behaviour: Callable[[Switchable, Watch], object]) -> None:
    """Runs `behaviour` on a registry and a watch that share a clock; the watch polls only when `poll` is called."""

    async def with_watch() -> None:
        registry = Switchable()
        await behaviour(registry, Watch(registry, clock=lambda: registry.now))  # type: ignore[misc]

    asyncio.run(with_watch())


def ids(watch: Watch) -> str:
    """Returns the ids of the table's replicas, in its order."""
    return " ".join(replica.id for replica in watch.replicas)


def test_an_expired_entry_leaves_the_table() -> None:
    """A replica that stops beating leaves the table; the others stay."""

    async def behaviour(registry: Switchable, watch: Watch) -> None:
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

    check(behaviour)


def test_an_outage_keeps_the_table_and_sets_stale_since() -> None:
    """While the registry is unreachable, the last table stays and `stale_since` names the start."""

    async def behaviour(registry: Switchable, watch: Watch) -> None:
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

    check(behaviour)


def test_entries_that_expired_during_an_outage_may_come_back() -> None:
    """After an outage, in which no replica could beat, replicas leave only after the grace period."""

    async def behaviour(registry: Switchable, watch: Watch) -> None:
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

    check(behaviour)


def test_an_emptied_store_refills_without_a_loss() -> None:
    """After a flush no replica leaves the table while heartbeats refill the store; new replicas join at once."""

    async def behaviour(registry: Switchable, watch: Watch) -> None:
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

    check(behaviour)


def test_a_store_half_refilled_between_two_polls_loses_no_replica() -> None:
    """A new generation starts the grace period, even if no poll found the store empty."""

    async def behaviour(registry: Switchable, watch: Watch) -> None:
        await registry.beat("a", "b")
        await watch.poll()
        registry.clear()
        await registry.beat("a")
        await watch.poll()
        assert ids(watch) == "a b"

    check(behaviour)


def test_a_replica_that_refilled_and_left_is_not_kept() -> None:
    """The grace period covers only entries not listed since the store was emptied."""

    async def behaviour(registry: Switchable, watch: Watch) -> None:
        await registry.beat("a", "b")
        await watch.poll()
        registry.clear()
        await registry.beat("a", "b")
        await watch.poll()
        await registry.deregister("a")
        await watch.poll()
        assert ids(watch) == "b"

    check(behaviour)


def test_changes_reach_the_callback_and_waiters() -> None:
    """The callback gets the whole table at each change and only then; if it fails, the watch continues."""
    tables: list[str] = []

    async def on_change(replicas: tuple[Replica, ...]) -> None:
        tables.append(" ".join(replica.id for replica in replicas))
        if len(tables) == 1:
            raise RuntimeError("a follower's bug")

    async def behaviour() -> None:
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

    asyncio.run(behaviour())
    assert tables == ["a", "a b", "b"]


def test_a_watch_starts_without_a_registry() -> None:
    """A watch starts before its registry: the table is empty and stale until the registry answers."""

    async def behaviour() -> None:
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

    asyncio.run(behaviour())
