"""The in-memory registry: its entries expire after the same time as in Redis."""

from __future__ import annotations

from registry_support import demand_of, expert_replica

from moiety.core.load import ReplicaLoad
from moiety.registry.memory import MemoryRegistry


async def test_entries_expire_by_the_given_clock() -> None:
    """Replicas live 3 s, load reports and missing experts 5 s, counters 60 s; setting an entry again restarts its time."""
    now = 100.0

    async def alive(registry: MemoryRegistry) -> tuple[int, int, int, int]:
        found = (
            await registry.replicas(),
            await registry.replica_load(),
            await registry.missing_experts(),
            await registry.expert_demand(),
        )
        return len(found[0]), len(found[1]), len(found[2]), len(found[3])

    registry = MemoryRegistry(lambda: now)
    await registry.register(expert_replica())
    await registry.publish_load("e0", ReplicaLoad(0.5, 0.0, 0.0, 0.0))
    await registry.report_missing_experts(0, [1])
    await registry.publish_load("r0", demand=demand_of((1,)))
    now = 102.0
    await registry.register(expert_replica())
    for now, expected in ((104.9, (1, 1, 1, 1)), (105.0, (0, 0, 0, 1)), (159.9, (0, 0, 0, 1)), (160.0, (0,) * 4)):
        assert await alive(registry) == expected, now


async def test_clearing_removes_everything_and_begins_a_new_generation() -> None:
    """`clear` looks like an emptied Redis to readers."""
    registry = MemoryRegistry()
    await registry.register(expert_replica())
    before = await registry.generation()
    registry.clear()
    assert await registry.replicas() == ()
    assert await registry.generation() is None
    await registry.register(expert_replica())
    assert await registry.generation() not in (None, before)
