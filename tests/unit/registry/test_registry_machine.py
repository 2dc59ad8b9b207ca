"""Random histories of services, a store and a watch: no live replica is lost, no gone one stays."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from registry_support import expert_replica, prefix_of

from moiety.core.replica import Replica
from moiety.errors import RegistryUnreachable, WritesRefused
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import HEARTBEAT_S, TTL_S, Registry
from moiety.registry.memory import MemoryRegistry
from moiety.registry.redis import RedisRegistry
from moiety.registry.watch import GRACE_S, Watch
from moiety.testing import fake_system

POLL_S = 0.25
IDS = tuple("abc")
OUT_S = HEARTBEAT_S + POLL_S  # a live replica whose entry was evicted is back after its next beat and a poll
GONE_S = TTL_S + GRACE_S + 2 * POLL_S  # after this long without trouble, the table is exact
TICKS = st.integers(1, 40)
STEADY_TICKS = 3  # a store stays in one state for at least one beat


class MemoryStore:
    """The memory registry, with the faults of a store."""

    def __init__(self) -> None:
        self.now, self.refuses = 0.0, ""
        store = self

        class Refusing(MemoryRegistry):
            async def register(self, replica: Replica) -> None:
                known = replica.id in {one.id for one in await self.replicas()}
                if not store.refuses or (store.refuses == "OOM" and known):
                    await super().register(replica)
                if store.refuses:
                    raise WritesRefused(store.refuses)

            async def deregister(self, replica_id: str) -> None:
                if store.refuses and store.refuses != "OOM":
                    raise WritesRefused(store.refuses)
                await super().deregister(replica_id)

            async def check_writes(self) -> None:
                if store.refuses:
                    raise WritesRefused(store.refuses)

        self._registry = Refusing(lambda: self.now)

    def open(self) -> Registry:
        return self._registry

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def empty(self) -> None:
        self._registry.clear()

    def evict(self, replica_id: str) -> None:
        """Removes one entry, as Redis does where its memory is full."""
        asyncio.run(MemoryRegistry.deregister(self._registry, replica_id))

    def refuse(self, how: str) -> None:
        self.refuses = how


class RedisStore:
    """One system's keys in a real Redis. Time passes by shortening the lives of all keys."""

    SHORTEN: ClassVar[str] = """
    for _, key in ipairs(redis.call('KEYS', ARGV[1] .. '*')) do
      local left = redis.call('PTTL', key)
      if left >= 0 then redis.call('PEXPIRE', key, math.max(0, left - ARGV[2])) end
    end
    """

    def __init__(self, server: EmbeddedRedis) -> None:
        self._server, self._client = server, redis.Redis(port=server.port)
        self._app, self._refuses = f"test-{uuid.uuid4().hex[:12]}", ""
        self._prefix = prefix_of(self._app).replace("{", "\\{")

    def open(self) -> Registry:
        return RedisRegistry(self._server.url, fake_system(app=self._app))

    def advance(self, seconds: float) -> None:
        how, _ = self._refuses, self.refuse("")
        self._client.eval(self.SHORTEN, 0, prefix_of(self._app), round(seconds * 1000))
        self.refuse(how)

    def empty(self) -> None:
        self._client.flushall()

    def evict(self, replica_id: str) -> None:
        self._client.delete(f"{prefix_of(self._app)}beat:{replica_id}")

    def refuse(self, how: str) -> None:
        self._refuses = how
        self._client.config_set("maxmemory", 1 if how == "OOM" else 0)
        self._client.config_set("min-replicas-to-write", 1 if how == "NOREPLICAS" else 0)

    def close(self) -> None:
        self.refuse("")
        self._client.close()


class Histories(RuleBasedStateMachine):
    """Services that start, beat, die and leave; a store that is cut off, refuses writes, is emptied or evicts; and a watch."""

    store: Any

    def __init__(self) -> None:
        super().__init__()
        self.now, self.ticks = 0.0, 0
        self.reachable, self.refuses = True, ""
        self.live: set[str] = set()  # services that beat
        self.registered: set[str] = set()  # of these, those that the store has taken
        self.absent_since: dict[str, float] = {}
        self.troubled_at = 0.0  # when the store was last at fault, or a service started or ended
        self.runner = asyncio.Runner()

    @initialize()
    def begin(self) -> None:
        self.writer, reader = self.store.open(), self.store.open()
        machine = self

        class Reached:
            """The reader's connection, which may be cut."""

            def __getattr__(self, name: str) -> Any:
                if not machine.reachable:
                    raise RegistryUnreachable("cut off")
                return getattr(reader, name)

        self.reader = reader
        self.watch = Watch(Reached(), clock=lambda: self.now)  # type: ignore[arg-type]
        self.live.update(IDS)
        self.settle()

    @rule(ticks=TICKS)
    def pass_time(self, ticks: int) -> None:
        for _ in range(ticks):
            self.tick()

    @rule(service=st.sampled_from(IDS))
    def start(self, service: str) -> None:
        self.live.add(service)
        self.troubled_at = self.now

    @rule(service=st.sampled_from(IDS))
    def die(self, service: str) -> None:
        self.stop_beating(service)

    @rule(service=st.sampled_from(IDS))
    def leave(self, service: str) -> None:
        self.stop_beating(service)
        if self.reachable:
            with suppress(WritesRefused):
                self.run(self.writer.deregister(service))

    @precondition(lambda self: self.reachable)
    @rule(ticks=TICKS)
    def cut(self, ticks: int) -> None:
        self.reachable = False
        self.settle(ticks)

    @precondition(lambda self: not self.reachable)
    @rule()
    def heal(self) -> None:
        self.reachable = True
        self.settle()

    @precondition(lambda self: not self.refuses)
    @rule(how=st.sampled_from(["OOM", "NOREPLICAS"]), ticks=TICKS)
    def refuse(self, how: str, ticks: int) -> None:
        self.refuses = how
        self.store.refuse(how)
        self.settle(ticks)

    @precondition(lambda self: self.refuses)
    @rule()
    def mend(self) -> None:
        self.refuses = ""
        self.store.refuse("")
        self.settle()

    @precondition(lambda self: not self.refuses)
    @rule()
    def empty(self) -> None:
        self.store.empty()
        self.settle()

    @precondition(lambda self: not self.refuses)
    @rule(service=st.sampled_from(IDS))
    def evict(self, service: str) -> None:
        self.store.evict(service)
        self.settle()

    def stop_beating(self, service: str) -> None:
        self.live.discard(service)
        self.registered.discard(service)
        self.absent_since.pop(service, None)
        self.troubled_at = self.now

    def settle(self, ticks: int = 0) -> None:
        self.troubled_at = self.now
        for _ in range(max(ticks, STEADY_TICKS)):
            self.tick()

    def tick(self) -> None:
        """Lets POLL_S pass, beats where a beat is due, polls and checks."""
        self.now += POLL_S
        self.ticks += 1
        self.store.advance(POLL_S)
        if not self.reachable or self.refuses:
            self.troubled_at = self.now
        if self.ticks % round(HEARTBEAT_S / POLL_S) == 0 and self.reachable:
            for service in sorted(self.live):
                with suppress(WritesRefused):
                    self.run(self.writer.register(expert_replica(service)))
                    self.registered.add(service)
        self.run(self.watch.poll())
        self.check()

    def check(self) -> None:
        table = {replica.id for replica in self.watch.replicas}
        for service in sorted(self.registered):
            if service in table:
                self.absent_since.pop(service, None)
            elif self.reachable or service in self.absent_since:
                out_s = self.now - self.absent_since.setdefault(service, self.now)
                assert out_s <= OUT_S, f"{service} beats and has been out of the table for {out_s} s"
        if self.now - self.troubled_at > GONE_S:
            assert table == self.live, f"after {GONE_S} s without trouble"

    def run(self, work: Awaitable[Any]) -> Any:
        async def awaited() -> Any:
            return await work

        return self.runner.run(awaited())

    def teardown(self) -> None:
        for registry in (self.writer, self.reader):
            self.run(registry.close())
        self.runner.close()


def explore(store: Any, examples: int, steps: int) -> None:
    """Runs `examples` random histories of up to `steps` steps over the stores that `store()` makes, the same at every run."""

    class Exploring(Histories):
        def __init__(self) -> None:
            super().__init__()
            self.store = store()

        def teardown(self) -> None:
            super().teardown()
            if isinstance(self.store, RedisStore):
                self.store.close()

    run_state_machine_as_test(
        Exploring,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_table_over_the_memory_registry_is_right() -> None:
    """A replica with a live heartbeat leaves the table for at most a beat and a poll; one that is gone does not stay."""
    explore(MemoryStore, 60, 25)


def test_a_table_over_redis_is_right() -> None:
    """The same over a real Redis."""
    with EmbeddedRedis() as server:
        explore(lambda: RedisStore(server), 15, 20)


@pytest.mark.slow
def test_many_more_histories() -> None:
    """More and longer histories. Over 20 s: it is a search."""
    explore(MemoryStore, 400, 60)
    with EmbeddedRedis() as server:
        explore(lambda: RedisStore(server), 40, 30)
