"""No service uses another system's services, nor what another system left behind.

The matrix is {other application, other cluster, other model, other group count, a dead writer} x {gateway, router, expert
replica, autoscaler, port}. A dead writer is one that the registry still lists, or whose keys are left there. More is tested in
`expert/test_expert_service.py` (a refused call), `deploy/test_autoscaling.py` and `test_compose_starts.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from redis import Redis

from moiety.core.experts import ExpertSet
from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Role
from moiety.core.system import SystemId
from moiety.errors import ConfigError, FailedPrecondition, HopFailed, Unavailable
from moiety.gateway.routers.router_pool import RouterPool
from moiety.registry.connect import connect, live_systems
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import Registry
from moiety.registry.memory import MemoryRegistry
from moiety.registry.watch import Watch
from moiety.scaling.ledger import Ledger
from moiety.testing import (
    HOST,
    SYSTEM,
    FakeEngine,
    FakeExperts,
    FakeGateway,
    fake_replica,
    fake_shape,
    fake_system,
    loopback_hop,
)
from moiety.tools.running.find import chosen_system
from moiety.wire.deadline import Deadline
from moiety.wire.http.identity import PATH, Owner, identified
from moiety.wire.http.server import HttpServer
from moiety.wire.shared_port import HTTP, check_port, listening

OTHERS: dict[str, dict[str, Any]] = {
    "app": {"app": "another"},
    "cluster": {"cluster": "another"},
    "revision": {"revision": "f" * 32},
    "groups": {"groups": 4},
    "slices": {"slices": 2},
}
other_systems = pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
SHAPE = fake_shape()
HELD = ExpertSet.uniform(SHAPE.moe_layers, range(SHAPE.experts))


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    """A server for all tests of this module; each uses an application of its own."""
    with EmbeddedRedis() as server:
        yield server


def _said(caplog: pytest.LogCaptureFixture, changes: dict[str, Any]) -> int:
    """Returns how many logged lines say what differs."""
    ((name, value),) = changes.items()
    return sum(f"its {name} is {value}, ours {getattr(SYSTEM, name)}" in record.message for record in caplog.records)


# Gateway -------------------------------------------------------------------------------------------------------


@other_systems
async def test_a_gateway_uses_no_router_of_another_system(changes: dict[str, Any], caplog: pytest.LogCaptureFixture):
    """A router at a listed address that describes itself as another system's gets no request; one line says why.

    The registry of a system lists only its own services. So such an entry is that of a dead router, whose address
    another system's router has got.
    """
    registry = MemoryRegistry(clock=lambda: 0.0)
    async with contextlib.AsyncExitStack() as stack:
        router = FakeEngine("r", SHAPE, system=fake_system(**changes))
        await router.start(registry)
        stack.push_async_callback(router.vanish)
        watch = Watch(registry, interval_s=0.02)
        await watch.start()
        stack.push_async_callback(watch.stop)
        pool = RouterPool(watch, SYSTEM, 0.3)
        stack.push_async_callback(pool.close)
        with pytest.raises(Unavailable, match="no router is ready"):
            await pool.pick(Deadline.after(None))
    assert _said(caplog, changes) == 1


# Router --------------------------------------------------------------------------------------------------------


@other_systems
async def test_a_router_calls_no_replica_of_another_system(changes: dict[str, Any], caplog: pytest.LogCaptureFixture):
    """A replica at a listed address that describes itself as another system's is not called; one line says why."""
    async with loopback_hop([], SHAPE, expert_wait_s=0.3) as lane:
        replica = FakeExperts("e", HELD, SHAPE, system=fake_system(**changes))
        await replica.start(lane.registry)
        try:
            with pytest.raises(HopFailed):
                await lane.compute(0, torch.ones(1, SHAPE.mlp.hidden), torch.zeros(1, 1, dtype=torch.int64))
            assert not replica.calls
        finally:
            await replica.vanish()
    assert _said(caplog, changes) == 1


# Expert replica and autoscaler: what they read in the registry --------------------------------------------------


@contextlib.asynccontextmanager
async def _registries(redis: EmbeddedRedis, *systems: SystemId) -> AsyncIterator[list[Registry]]:
    opened: list[Registry] = [connect(redis.url, system) for system in systems]
    try:
        yield opened
    finally:
        for registry in opened:
            await registry.close()


async def _leave_traces(registry: Registry, system: SystemId) -> None:
    """Writes everything that a system's services write."""
    await registry.register(fake_replica("router-1", Role.ROUTER, 1, system=system))
    await registry.register(fake_replica("expert-1", Role.EXPERT, 2, system=system, held=HELD))
    assert await registry.set_placement(Placement(1, {"experts-0": HELD}))
    await registry.publish_load("expert-1", ReplicaLoad(1.0, 9.0, 9.0, 9.0))
    counters = ((9, 9), (9, 9))
    await registry.publish_load("router-1", demand=ExpertDemand(counters, counters, time=1.0))
    await registry.report_missing_experts(0, [1])
    await registry.record_decision({"deployment": "experts-0"})


@other_systems
async def test_another_systems_traces_do_not_exist(redis: EmbeddedRedis, changes: dict[str, Any]):
    """On one Redis, an expert replica finds no other system's placement, and an autoscaler none of its load or decisions."""
    ours = fake_system(app=f"app-{next(iter(changes))}")
    other = replace(ours, **changes)
    async with _registries(redis, ours, other) as (mine, theirs):
        await _leave_traces(theirs, other)
        reading = await Ledger(mine).read()
        assert (reading.replicas, reading.busy, reading.missing_experts, reading.placement) == ((), {}, {}, None)
        assert reading.rows_per_s.size == 0
        assert await mine.placement_epoch() == 0
        assert not await mine.routers()
        assert not await mine.decisions()
        assert (await Ledger(theirs).read()).placement == Placement(1, {"experts-0": HELD})


async def test_what_a_dead_system_left_behind_expires(redis: EmbeddedRedis):
    """Every key that a system writes has an expiry, so nothing outlives its writers for long."""
    system = fake_system(app="expiring")
    async with _registries(redis, system) as (registry,):
        await _leave_traces(registry, system)
        with Redis.from_url(redis.url) as store:
            lifetimes = {key: store.ttl(key) for key in store.keys("moiety:{expiring}:*")}
    assert len(lifetimes) >= 10
    assert all(0 < seconds <= 24 * 3600 for seconds in lifetimes.values()), lifetimes


async def test_the_live_systems_of_an_application_are_named(redis: EmbeddedRedis):
    """The systems with a live service are listed; a command that needs one of several asks for a part of its name."""
    first = fake_system(app="named")
    second, dead = replace(first, revision="2" * 32), replace(first, revision="d" * 32)
    async with _registries(redis, first, second, dead) as registries:
        for registry, system in zip(registries, (first, second, dead), strict=True):
            await registry.register(fake_replica("router-1", Role.ROUTER, 1, system=system))
        await registries[2].deregister("router-1")
    live = await live_systems(redis.url, "named")
    assert set(live) == {first, second}
    assert chosen_system(live, "named", "222") == second
    with pytest.raises(FailedPrecondition, match=r"2 live systems of application named: .* choose one .* --system"):
        chosen_system(live, "named", "")


# Port ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [OTHERS["app"], OTHERS["cluster"]], ids=["app", "cluster"])
async def test_a_port_of_another_system_is_refused(changes: dict[str, Any]):
    """A gateway refuses a port where another application or cluster is served, and names who listens there."""
    other = fake_system(**changes)
    async with FakeGateway(other) as gateway:
        port = gateway.port
        with pytest.raises(
            ConfigError, match=f"gateway.port = {port}: .* serves model fake of another system, {other}"
        ):
            await check_port(HOST, port, SYSTEM)
        with pytest.raises(ConfigError, match="serves model fake"):  # on every interface, it would share the port too
            await check_port("0.0.0.0", port, None)


@pytest.mark.parametrize("name", ["revision", "groups", "slices"])
async def test_the_port_of_the_same_application_is_handed_over(name: str):
    """While an application changes its model or groups, the new gateway waits until the old one has left, but not for ever."""
    async with FakeGateway(fake_system(**OTHERS[name])) as gateway:
        port = gateway.port
        with pytest.raises(ConfigError, match="of another system"):
            await check_port(HOST, port, SYSTEM, handover_s=0.2)
        checking = asyncio.create_task(check_port(HOST, port, SYSTEM))
        await asyncio.wait([checking], timeout=0.5)
        assert not checking.done()
        await gateway.stop()
        await checking


async def test_a_port_is_shared_by_gateways_of_one_system_and_free_after_their_death():
    """A gateway of the same system may listen too; a dead gateway holds no port; any other program is refused."""
    async with FakeGateway(SYSTEM) as gateway:
        port = gateway.port
        await check_port(HOST, port, SYSTEM)
    await check_port(HOST, port, fake_system(app="another"))
    server = await asyncio.start_server(lambda _, writer: writer.close(), HOST, port)
    async with server:
        with pytest.raises(ConfigError, match=f"another program listens at {HOST}:{port}"):
            await check_port(HOST, port, SYSTEM)


async def test_of_two_systems_that_start_at_once_one_gets_the_port(unused_tcp_port: int):
    """Looking who listens and beginning to listen is one step: of two systems' gateways that start together, one is refused."""
    systems = [SYSTEM, fake_system(app="another")]
    gateways = [FakeGateway(system) for system in systems]

    async def start(system: SystemId, gateway: FakeGateway) -> None:
        async with listening(HOST, unused_tcp_port, system):
            await gateway.start(unused_tcp_port)

    outcomes = await asyncio.gather(*map(start, systems, gateways), return_exceptions=True)
    await asyncio.gather(*(gateway.stop() for gateway in gateways))
    refused = [outcome for outcome in outcomes if isinstance(outcome, ConfigError)]
    assert len(refused) == 1, outcomes
    assert "serves model fake of another system" in str(refused[0])


# The identity itself -------------------------------------------------------------------------------------------


def test_the_text_of_an_identity_is_read_back():
    """parse is the inverse of str; what has another form is refused; every part changes text and key."""
    assert SystemId.parse(str(SYSTEM)) == SYSTEM
    for text in ("", "a/b/c", f"{SYSTEM}/more", str(SYSTEM).replace("groups=2", "groups=two")):
        with pytest.raises(ValueError, match="expected APP/CLUSTER"):
            SystemId.parse(text)
    systems = [SYSTEM, *(fake_system(**changes) for changes in OTHERS.values())]
    assert len({system.key for system in systems}) == len({str(system) for system in systems}) == len(systems)
    assert SYSTEM.difference("nonsense") == f"it names no system ('nonsense'), ours is {SYSTEM}"


# HTTP port -----------------------------------------------------------------------------------------------------


async def _app(_scope: object, _receive: object, _send: Any) -> None:
    raise AssertionError("no request was to reach the app")


@contextlib.asynccontextmanager
async def _http_gateway(system: SystemId) -> AsyncIterator[tuple[HttpServer, int]]:
    """The HTTP server of a gateway of `system`, and its port."""
    server = HttpServer(identified(_app, Owner("fake", str(system))), share_port=True)
    try:
        yield server, await server.start(HOST, 0)
    finally:
        await server.stop(0)


async def test_an_http_port_is_shared_by_gateways_of_one_system_only():
    """The HTTP port has the rules of the gRPC port: free for the same system, refused to every other, free afterwards."""
    other = fake_system(app="another")
    async with _http_gateway(SYSTEM) as (_, port):
        await check_port(HOST, port, SYSTEM, door=HTTP)
        async with listening(HOST, port, SYSTEM, HTTP):
            pass
        with pytest.raises(
            ConfigError, match=f"gateway.http_port = {port}: .* serves model fake of another system, {SYSTEM}"
        ):
            await check_port(HOST, port, other, door=HTTP)
        with pytest.raises(ConfigError, match=r"gateway\.port = .*: another program listens"):
            await check_port(HOST, port, SYSTEM)  # it is no port for gRPC
    await check_port(HOST, port, other, door=HTTP)


async def test_the_http_port_of_the_same_application_is_handed_over():
    """While an application changes its model, the new gateway waits until the old one has left its HTTP port."""
    async with _http_gateway(fake_system(**OTHERS["revision"])) as (server, port):
        checking = asyncio.create_task(check_port(HOST, port, SYSTEM, door=HTTP))
        await asyncio.wait([checking], timeout=0.5)
        assert not checking.done()
        await server.stop(0)
        await checking


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n\r\n[]",
        b'HTTP/1.1 200 OK\r\n\r\n{"model": "m"}',
        b"\xff" * 100_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 15_000,
    ],
    ids=["nothing", "a text", "a list", "no system", "bytes", "depth"],
)
async def test_another_program_at_the_http_port_is_refused(said: bytes, monkeypatch: pytest.MonkeyPatch):
    """Whatever another program answers, or if it answers nothing, the setting is named."""
    monkeypatch.setattr("moiety.wire.shared_port.ANSWER_S", 0.2)
    asked: list[tuple[bytes, asyncio.StreamWriter]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readline(), writer))
        writer.write(said)
        if said:
            writer.close()

    server = await asyncio.start_server(answer, HOST, 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConfigError, match=f"gateway.http_port = {port}: another program listens at {HOST}:{port}"):
            await check_port(HOST, port, SYSTEM, door=HTTP)
    for line, writer in asked:
        assert line == f"GET {PATH} HTTP/1.1\r\n".encode()
        writer.close()
    assert len(asked) == 2
