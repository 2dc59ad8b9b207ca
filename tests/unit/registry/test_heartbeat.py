"""The heartbeat keeps an entry alive through outages and failures, and removes it at the end."""

from __future__ import annotations

import asyncio
import logging

import pytest
from registry_support import eventually, expert_replica

from moiety.core.replica import Replica, ReplicaState
from moiety.core.supervise import TASKS
from moiety.errors import RegistryUnreachable
from moiety.registry.connect import connect
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.heartbeat import Heartbeat
from moiety.registry.interface import HEARTBEAT_S, TTL_S
from moiety.registry.memory import MemoryRegistry
from moiety.testing import SYSTEM


async def test_an_entry_lives_from_start_to_stop() -> None:
    """The entry exists when `start` returns, follows the service's state, and is gone when `stop` returns."""
    registry = MemoryRegistry()
    state = ReplicaState.STARTING
    heartbeat = Heartbeat(registry, lambda: expert_replica(state=state), interval_s=0.02)
    await heartbeat.start()
    assert await registry.replicas() == (expert_replica(state=ReplicaState.STARTING),)
    state = ReplicaState.READY

    async def ready() -> bool:
        return await registry.replicas() == (expert_replica(state=ReplicaState.READY),)

    await eventually(ready)
    state = ReplicaState.DRAINING
    await heartbeat.beat()
    assert await registry.replicas() == (expert_replica(state=ReplicaState.DRAINING),)
    await heartbeat.stop()
    assert await registry.replicas() == ()


async def test_an_emptied_redis_refills() -> None:
    """After FLUSHALL every heartbeat writes its entry again, under a new generation."""
    with EmbeddedRedis() as server:
        registry = connect(server.url, SYSTEM)
        heartbeats = [Heartbeat(registry, expert_replica(f"e{n}")) for n in range(3)]
        for heartbeat in heartbeats:
            await heartbeat.start()
        before = await registry.generation()
        await flush(server)

        async def refilled() -> bool:
            return len(await registry.replicas()) == 3

        await eventually(refilled)
        assert await registry.generation() != before
        for heartbeat in heartbeats:
            await heartbeat.stop()
        assert await registry.replicas() == ()
        await registry.close()


async def test_an_outage_is_logged_once_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    """However many beats and actions fail, one line logs the outage and one the recovery."""
    with caplog.at_level(logging.INFO, logger="moiety"), EmbeddedRedis() as server:
        registry = connect(server.url, SYSTEM)

        async def action() -> None:
            await registry.report_missing_experts(0, [1])

        heartbeat = Heartbeat(registry, expert_replica(), interval_s=0.05, on_beat=[action])
        await heartbeat.start()
        server.stop()

        async def logged() -> bool:
            return "Connection refused" in caplog.text or "Connect call failed" in caplog.text

        await eventually(logged)
        await asyncio.sleep(0.3)  # a few more beats, which must not be logged
        with EmbeddedRedis(server.port):

            async def back() -> bool:
                return "works again" in caplog.text and await registry.replicas() == (expert_replica(),)

            await eventually(back)
            await heartbeat.stop()
            await registry.close()
    assert len(caplog.records) == 2, caplog.text


async def test_actions_fail_and_hang_alone(caplog: pytest.LogCaptureFixture) -> None:
    """An action with a bug is logged once and called again; one that hangs stops neither the others nor the heartbeat."""
    calls = {"failing": 0, "healthy": 0}

    async def failing() -> None:
        calls["failing"] += 1
        raise RuntimeError("a bug")

    async def hanging() -> None:
        await asyncio.Event().wait()

    async def healthy() -> None:
        calls["healthy"] += 1

    with caplog.at_level(logging.WARNING, logger="moiety"):
        registry = MemoryRegistry()
        beats = 0

        def counted() -> Replica:
            nonlocal beats
            beats += 1
            return expert_replica()

        heartbeat = Heartbeat(registry, counted, on_beat=[hanging, failing, healthy], interval_s=0.01)
        await heartbeat.start()

        async def all_continued() -> bool:
            return calls["failing"] >= 3 and calls["healthy"] >= 5 and beats >= 8

        await eventually(all_continued)
        await heartbeat.stop()
        ended = dict(calls)
        await asyncio.sleep(0.05)
        assert calls == ended
    assert caplog.text.count("a bug\n") == 1, "one traceback"
    assert TASKS.failures["action at a beat"] >= 3


async def test_a_required_registry_must_answer_at_start() -> None:
    """With `require` the first failure is raised; without it, the service starts and registers later."""
    registry = connect("redis://127.0.0.1:1/0", SYSTEM)
    with pytest.raises(RegistryUnreachable):
        await Heartbeat(registry, expert_replica(), require=True).start()
    heartbeat = Heartbeat(registry, expert_replica())
    await heartbeat.start()
    await heartbeat.stop()
    await registry.close()


async def test_stopping_does_not_wait_for_a_registry_that_hangs() -> None:
    """`stop` returns after its second and raises nothing, even if a beat and the removal hang."""

    class Hanging(MemoryRegistry):
        hangs = False

        async def register(self, replica: Replica) -> None:
            if self.hangs:
                await asyncio.Event().wait()

        async def deregister(self, replica_id: str) -> None:
            await asyncio.Event().wait()

    registry = Hanging()
    heartbeat = Heartbeat(registry, expert_replica(), interval_s=0.01)
    await heartbeat.start()
    registry.hangs = True
    await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        await heartbeat.stop()


def test_several_beats_fit_into_a_lifetime() -> None:
    """A replica is removed only after it has missed several beats."""
    assert TTL_S >= 4 * HEARTBEAT_S


async def flush(server: EmbeddedRedis) -> None:
    """Empties the server, as an operator or a restart would."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"FLUSHALL\r\n")
    assert await reader.readline() == b"+OK\r\n"
    writer.close()
    await writer.wait_closed()
