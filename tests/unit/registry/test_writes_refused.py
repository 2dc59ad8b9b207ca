"""A Redis that answers reads but refuses writes costs no live replica its place, in each way in which Redis refuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest
from registry_support import eventually, expert_replica, opened, prefix_of

from moiety.core.load import ReplicaLoad
from moiety.core.replica import Role
from moiety.errors import WritesRefused
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.heartbeat import Heartbeat
from moiety.registry.redis import ENTRY_TTL_S, REWRITE_S
from moiety.registry.watch import GRACE_S, Watch
from support.refusing_redis import REFUSALS, RefusingRedis


@pytest.fixture
def store() -> Iterator[RefusingRedis]:
    """A server of this test's own."""
    with EmbeddedRedis() as server:
        refusing = RefusingRedis(server)
        yield refusing
        refusing.client.close()


@pytest.mark.parametrize("how", REFUSALS)
async def test_an_expired_entry_proves_nothing_while_writes_are_refused(
    store: RefusingRedis, app: str, how: str
) -> None:
    """Reads answer, the error says what to do, the table keeps its replicas, and later one that died leaves."""
    now = 0.0
    async with opened(store.server.url, app) as registry:
        watch = Watch(registry, clock=lambda: now)
        for replica_id in ("dies", "lives"):
            await registry.register(expert_replica(replica_id))
        await registry.publish_load("lives", ReplicaLoad(0.5, 1.0, 2.0, 3.0))
        await watch.poll()
        both = watch.replicas
        assert len(both) == 2
        for replica_id in ("dies", "lives"):
            store.client.pexpire(f"{prefix_of(app)}beat:{replica_id}", 20)
        store.client.pexpire(f"{prefix_of(app)}busy:lives", 20)
        code = store.refuse(how)
        await asyncio.sleep(0.05)
        with pytest.raises(WritesRefused, match=f"refuses writes: {code}: "):
            await registry.register(expert_replica("lives"))
        async with opened(store.server.url, app) as reader:
            # Scripts on a replica of version 6 still see keys that have expired.
            listed = await reader.replicas()
            assert not listed or how == "READONLY"
            await reader.systems()
            await reader.replica_load()
            assert await reader.expert_demand() == await reader.missing_experts() == {}
        for _ in range(3):
            await watch.poll()
            assert watch.replicas == both
            assert listed or code in str(watch.refused)
            assert watch.stale_since is None
            now += 2 * GRACE_S
        store.mend()
        await watch.poll()  # before any beat
        await registry.register(expert_replica("lives"))
        await watch.poll()
        assert watch.replicas == both
        now += GRACE_S
        await watch.poll()
        assert watch.replicas == (expert_replica("lives"),)
        assert watch.refused is None
        await registry.deregister("lives")
        await watch.poll()
        assert watch.replicas == ()


@pytest.mark.parametrize("role", [Role.EXPERT, Role.ROUTER])
async def test_a_full_redis_still_renews(
    store: RefusingRedis, app: str, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its memory is full, an entry lives on, also when it is due to be written again, and when a newer one is refused."""
    loop = asyncio.get_running_loop()
    clock, ahead = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: clock() + ahead)
    beat, entry = (f"{prefix_of(app)}{kind}:e0" for kind in ("beat", "replica"))
    async with opened(store.server.url, app) as registry:
        replica = expert_replica(role=role)
        await registry.register(replica)
        store.refuse("OOM")
        await registry.register(replica)  # only renews
        ahead = REWRITE_S
        for due in (replica, expert_replica(role=role, served=1.0)):
            store.client.pexpire(beat, 500)
            store.client.pexpire(entry, 500)
            with pytest.raises(WritesRefused, match="raise maxmemory"):
                await registry.register(due)
            assert store.client.pttl(beat) > 1000
            assert store.client.pttl(entry) > 1000 * (ENTRY_TTL_S - 2)
            assert await registry.replicas() == (replica,)
        store.mend()
        await registry.register(due)
        assert await registry.replicas() == (due,)


async def test_a_service_starts_while_writes_are_refused(store: RefusingRedis, app: str) -> None:
    """A registry that refuses the first entry stops no start, and lists the service once it takes writes."""
    async with opened(store.server.url, app) as registry:
        store.refuse("OOM")
        heartbeat = Heartbeat(registry, expert_replica(), require=True, interval_s=0.02)
        await heartbeat.start()
        assert "OOM" in str(heartbeat.trouble)
        store.mend()

        async def listed() -> bool:
            return bool(await registry.replicas())

        await eventually(listed)
        await heartbeat.stop()


async def test_a_refusal_is_logged_once_and_shown(
    store: RefusingRedis, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However many beats fail, the refusal is one line and the recovery another; meanwhile `trouble` says why."""
    replica = expert_replica()
    with caplog.at_level(logging.INFO, logger="moiety"):
        async with opened(store.server.url, app) as registry:

            async def action() -> None:
                await registry.publish_load("e0", ReplicaLoad(0.5, 1.0, 2.0, 3.0))

            heartbeat = Heartbeat(registry, lambda: replica, interval_s=0.02, on_beat=[action])
            await heartbeat.start()
            assert heartbeat.trouble is None
            store.refuse("NOREPLICAS")

            async def troubled() -> bool:
                return heartbeat.trouble is not None and "NOREPLICAS" in heartbeat.trouble

            await eventually(troubled)
            await asyncio.sleep(0.2)  # some more beats, which must not be logged
            store.mend()

            async def listed() -> bool:
                return heartbeat.trouble is None and await registry.replicas() == (replica,)

            await eventually(listed)
            await heartbeat.stop()
    assert len(caplog.records) == 2, caplog.text
    assert "refuses writes" in caplog.records[0].getMessage()
