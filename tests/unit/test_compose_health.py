"""The health of a service of any kind: its own check, its tasks and its event loop, as the registry and Serve see them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from moiety.compose.running import MOST_LATE, Running
from moiety.compose.service_parts import ServiceParts
from moiety.core.replica import ReplicaState, Role
from moiety.core.supervise import TASKS, supervise
from moiety.errors import ConfigError, Unavailable
from moiety.registry.memory import MemoryRegistry
from moiety.testing import HOST, eventually
from moiety.testing.common import fake_replica
from moiety.wire.server import Server


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes services look every 20 ms, and count 100 ms as late."""
    monkeypatch.setattr("moiety.compose.running.LOOK_S", 0.02)
    monkeypatch.setattr("moiety.compose.running.LATE_S", 0.1)


@asynccontextmanager
async def running(role: Role = Role.GATEWAY, **parts_of: Any) -> AsyncIterator[tuple[Running, MemoryRegistry]]:
    """A running service without any work, and its registry. `parts_of`: further fields of its ServiceParts."""
    server, registry = Server([], []), MemoryRegistry()
    parts = ServiceParts(role=role, server=server, idle=lambda: True, **parts_of)
    replica = fake_replica("g", role, await server.start(HOST, 0))
    service = Running(parts, replica, registry, AsyncExitStack())
    await service.register()
    try:
        yield service, registry
    finally:
        await service.close()


def block(seconds: float) -> None:
    """Blocks the event loop, as a computation on it would."""
    time.sleep(seconds)


async def state_in(registry: MemoryRegistry) -> ReplicaState:
    """Returns the state that the registry lists."""
    (replica,) = await registry.replicas()
    return replica.state


async def test_a_task_that_ended_by_a_failure_makes_its_service_sick():
    """The registry lists the service as SICK, and why, at once; Serve's check fails with the task's name and error."""

    async def fail() -> None:
        raise OSError("too many open files")

    async with running() as (service, registry):
        service.healthy()
        supervise("listener", fail, restart=False)
        try:
            await eventually(lambda: service.replica.state is ReplicaState.SICK)
            with pytest.raises(Unavailable, match="task 'listener' ended by OSError: too many open files"):
                service.healthy()
            await asyncio.sleep(0)
            assert await state_in(registry) is ReplicaState.SICK
            assert "task 'listener' ended by OSError" in service.replica.problem
        finally:
            TASKS.forget()
        await eventually(lambda: service.replica.state is ReplicaState.READY)
        assert service.replica.problem == ""


async def test_a_loop_that_is_blocked_once_is_well_and_again_and_again_is_sick():
    """One long pause, as after SIGSTOP, counts for nothing; several in a row make the service sick until they end."""
    async with running() as (service, _):
        block(0.5)
        await asyncio.sleep(0.1)
        service.healthy()
        for _ in range(MOST_LATE):
            block(0.3)
            await asyncio.sleep(0.001)
        await eventually(lambda: service.replica.state is ReplicaState.SICK, within_s=1.0)
        await eventually(lambda: service.replica.state is ReplicaState.READY)


async def test_a_loop_that_is_blocked_for_long_each_time_is_sick(monkeypatch: pytest.MonkeyPatch):
    """Blocks that each outlast the memory of failures are still several in a row."""
    monkeypatch.setattr("moiety.core.progress.FORGET_S", 0.2)
    async with running() as (service, _):
        await asyncio.sleep(0.1)
        for _ in range(MOST_LATE):
            block(0.3)
            await asyncio.sleep(0.001)
        await eventually(lambda: service.replica.state is ReplicaState.SICK, within_s=1.0)


async def test_a_sick_service_drains_at_once():
    """What a sick service has in flight does not finish: its replacement need not wait for it."""
    async with running() as (service, _):

        async def fail() -> None:
            raise OSError

        supervise("listener", fail, restart=False)
        try:
            await eventually(lambda: service.replica.state is ReplicaState.SICK)
            began = time.monotonic()
            await service.drain(30.0)
            assert time.monotonic() - began < 5.0
            assert service.replica.state is ReplicaState.DRAINING
        finally:
            TASKS.forget()


async def test_refused_live_settings_change_nothing():
    """The service goes on with those it had, and its registry entry tells why until it is given others."""
    applied: list[Mapping[str, Any]] = []

    async def reconfigure(values: Mapping[str, Any]) -> None:
        if values.get("capacity") == -1:
            raise ConfigError("user_config.capacity", -1, "must be above 0")
        applied.append(values)

    async with running(reconfigure=reconfigure) as (service, _):
        for wrong in ({"capacity": -1}, ["capacity"]):
            with pytest.raises(ConfigError):
                await service.reconfigure(wrong)  # type: ignore[arg-type]  # Serve passes on what it gets
            assert service.replica.problem.startswith("live settings refused: setting user_config")
            assert service.replica.state is ReplicaState.READY
        await service.reconfigure({"capacity": 5})
        assert (applied, service.replica.problem) == ([{"capacity": 5}], "")


@pytest.mark.parametrize("ending", [False, True])
async def test_a_service_waits_for_those_that_use_it(ending: bool, monkeypatch: pytest.MonkeyPatch):
    """A router that nobody replaces stays for a while, at the end of its system until no gateway is listed."""
    monkeypatch.setattr("moiety.compose.departure.SUCCESSOR_S", 0.3)
    async with running(role=Role.ROUTER, calls_end=False) as (service, registry):
        await registry.register(fake_replica("caller", Role.GATEWAY, 1))
        draining = asyncio.create_task(service.drain(30.0, ending=ending))
        if ending:
            await asyncio.sleep(0.6)
            assert not draining.done()
            await registry.deregister("caller")
        async with asyncio.timeout(5):
            await draining
