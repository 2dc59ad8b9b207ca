"""A reader that follows changes gets the same table as a new reader, for fewer bytes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable

import pytest
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from registry_support import demand_of, expert_replica, opened, prefix_of

from moiety.core.experts import ExpertSet
from moiety.core.replica import Replica, Role
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.entries import replica_to_json
from moiety.registry.listing import Listing, digest_of
from moiety.registry.redis import REWRITE_S, RedisRegistry
from moiety.registry.watch import GRACE_S, Watch
from moiety.testing import fake_system

IDS = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("register"), IDS, st.integers(0, 2)),
        st.tuples(st.sampled_from(["expire", "deregister"]), IDS),
        st.tuples(st.sampled_from(["beat", "flush", "restart", "save", "restore"])),
    ),
    max_size=12,
)


class System:
    """Three services that beat, and the entries of them that a correct store must list."""

    def __init__(self, client: redis.Redis, url: str, app: str) -> None:
        self._client, self._url, self._app = client, url, app
        self._prefix = prefix_of(app)
        self.writer = RedisRegistry(url, fake_system(app=app))
        self.running: dict[str, Replica] = {}
        self.stored: dict[str, Replica] = {}
        self._saved: tuple[dict[bytes, bytes], dict[str, Replica]] = {}, {}

    async def take(self, step: str, replica_id: str = "", variant: int = 0) -> None:
        if step == "register":
            replica = expert_replica(replica_id, placement_epoch=variant)
            self.running[replica_id] = self.stored[replica_id] = replica
            await self.writer.register(replica)
        elif step == "expire":
            self._client.delete(f"{self._prefix}beat:{replica_id}")
            self.stored.pop(replica_id, None)
        elif step == "deregister":
            await self.writer.deregister(replica_id)
            assert not [key for key in self._keys() if key.endswith(f":{replica_id}".encode())]
            self.running.pop(replica_id, None)
            self.stored.pop(replica_id, None)
        elif step == "beat":
            for replica in self.running.values():
                await self.writer.register(replica)
            self.stored.update(self.running)
        elif step == "restart":  # of the services: they return under their ids and know nothing of what was written
            await self.writer.close()
            self.writer = RedisRegistry(self._url, fake_system(app=self._app))
        elif step == "save":
            self._saved = {key: self._client.dump(key) for key in self._keys()}, dict(self.stored)
        else:  # flush, or a failover to a server that had not received the last writes
            for key in self._keys():
                self._client.delete(key)
            dumped, stored = self._saved if step == "restore" else ({}, {})
            for key, value in dumped.items():
                self._client.restore(key, 0, value)
            self.stored = dict(stored)

    def _keys(self) -> list[bytes]:
        return self._client.keys(f"{self._prefix}*")

    def expected(self) -> tuple[Replica, ...]:
        return tuple(self.stored[replica_id] for replica_id in sorted(self.stored))


@given(steps=STEPS)
@example(steps=[("register", "a", 0), ("save",), ("register", "a", 1), ("restore",)])  # the beat finds an older entry
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_reader_that_follows_sees_what_a_new_one_sees(redis_server: EmbeddedRedis, steps: list[tuple]) -> None:
    """After any writes, expiries, flushes and failovers, a following reader, a new reader and the watch see the same table."""

    async def behaviour(client: redis.Redis) -> None:
        url, app, now = redis_server.url, f"test-{uuid.uuid4().hex[:12]}", 0.0
        system = System(client, url, app)
        async with opened(url, app) as reader, opened(url, app) as watched:
            watch = Watch(watched, clock=lambda: now)
            try:
                for step in (*steps, ("beat",)):
                    await system.take(*step)
                    async with opened(url, app) as new:
                        assert await reader.replicas() == await new.replicas() == system.expected()
                    await watch.poll()
                    now += GRACE_S  # the watch's grace period is over
                    await watch.poll()
                    assert watch.replicas == system.expected()
            finally:
                await system.writer.close()

    with redis.Redis(port=redis_server.port) as client:
        asyncio.run(behaviour(client))


async def test_unchanged_entries_are_not_sent(redis_server: EmbeddedRedis, app: str) -> None:
    """An unchanged table costs a few bytes whatever its size; a changed entry costs a list of digests and its own text."""
    held = ExpertSet({layer: frozenset(range(layer % 3, 256, 3)) for layer in range(60)})
    replicas = [expert_replica(f"experts-0-{n:04}", held=held) for n in range(100)]
    changed = expert_replica(replicas[7].id, held=held, placement_epoch=9)
    size = len(replica_to_json(changed))
    assert size > 1000

    async def transferred(registry: RedisRegistry, *actions: Awaitable[object]) -> int:
        """Returns the bytes transferred by `actions`, without those of reading the counters."""
        earlier, before = [(await registry.server_counters())[1] for _ in range(2)]
        for action in actions:
            await action
        return (await registry.server_counters())[1] - before - (before - earlier)

    async with opened(redis_server.url, app) as writer, opened(redis_server.url, app) as reader:
        for replica in replicas:
            await writer.register(replica)
        assert await transferred(reader, reader.replicas()) > 100 * size
        assert await transferred(reader, *(reader.replicas() for _ in range(10))) < 10 * 1500
        assert await transferred(writer, *(writer.register(replicas[0]) for _ in range(10))) < 10 * 300
        await writer.register(changed)
        assert await transferred(reader, reader.replicas()) < 2 * size + 100 * 64
        assert changed in await reader.replicas()

        await writer.publish_load("r0", demand=demand_of((5,) * 10_000))
        assert await transferred(reader, reader.expert_demand()) > 2 * 4 * 10_000
        assert await transferred(reader, *(reader.expert_demand() for _ in range(10))) < 10 * 2000
        await writer.publish_load("r0", demand=(flushed := demand_of((6,) * 10_000)))
        assert await reader.expert_demand() == {"r0": flushed}


@pytest.mark.parametrize(
    "evicted", [("replicas",), ("routers",), ("replica:e0",), ("beat:e0",), ("replicas", "generation")]
)
async def test_a_store_that_lost_parts_is_repaired(
    redis_server: EmbeddedRedis, app: str, evicted: tuple[str, ...]
) -> None:
    """Whichever key of a router's entry Redis has evicted, the next beat writes it again."""
    router = expert_replica(role=Role.ROUTER)
    with redis.Redis(port=redis_server.port) as client:
        async with opened(redis_server.url, app) as registry:
            await registry.register(router)
            assert client.delete(*(f"{prefix_of(app)}{key}" for key in evicted)) == len(evicted)
            await registry.register(router)
            assert await registry.replicas() == await registry.routers() == (router,)
            assert await registry.generation() is not None


async def test_a_full_write_is_repeated(redis_server: EmbeddedRedis, app: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generation, which no beat looks at, comes back within REWRITE_S if Redis has evicted it."""
    loop = asyncio.get_running_loop()
    clock, ahead = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: clock() + ahead)
    with redis.Redis(port=redis_server.port) as client:
        async with opened(redis_server.url, app) as registry:
            await registry.register(expert_replica())
            client.delete(f"{prefix_of(app)}generation")
            await registry.register(expert_replica())
            assert await registry.generation() is None
            ahead = REWRITE_S
            await registry.register(expert_replica())
            assert await registry.generation() is not None


def test_a_text_that_changed_between_listing_and_fetching_is_not_kept() -> None:
    """An entry written between listing and fetching counts in this reading; the next one lists and fetches it again."""
    old, new = expert_replica(placement_epoch=1), expert_replica(placement_epoch=2)
    beats = [(b"e0", digest_of(replica_to_json(old)))]

    def decode(replica_id: bytes, text: bytes) -> Replica:
        return {replica_to_json(replica).encode(): replica for replica in (old, new)}[text]

    hasty = Listing().following(b"listed", beats, {b"e0": replica_to_json(new).encode()}, decode)
    assert (hasty.digest, hasty.replicas, hasty.unknown(beats)) == (b"", (new,), [b"e0"])
    gone = Listing().following(b"listed", beats, {b"e0": None}, decode)
    assert (gone.digest, gone.replicas, gone.unknown(beats)) == (b"", (), [b"e0"])
    read = Listing().following(b"listed", beats, {b"e0": replica_to_json(old).encode()}, decode)
    assert (read.digest, read.replicas, read.unknown(beats)) == (b"listed", (old,), [])
