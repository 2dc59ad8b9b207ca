"""A service's life cycle, the same for all three kinds: bind, register, beat, drain, close."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

from moiety import __version__
from moiety.config.services import ServiceSettings
from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.progress import Progress
from moiety.core.replica import Replica, ReplicaState, Role
from moiety.core.supervise import TASKS, supervise
from moiety.core.system import SystemId
from moiety.errors import ConfigError, RegistryUnreachable, Unavailable
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import pinned_revision
from moiety.registry.connect import connect
from moiety.registry.heartbeat import Heartbeat
from moiety.registry.interface import Registry
from moiety.telemetry.export import configure, configure_metrics
from moiety.telemetry.metrics import Meter
from moiety.telemetry.names import MetricName, ResourceAttribute
from moiety.telemetry.tracing import Tracer
from moiety.wire.server import Server

LEDGER_S = 1.0  # how often a service reports its load
LOOK_S = 0.5  # how often a service looks whether it is healthy
LATE_S = 2.0  # a look that comes so much later means that the event loop was blocked
MOST_LATE = 3  # looks in a row that may be late
DRAIN_NOTICE_S = 0.6  # others read the registry every 0.25 s: after this time they send no new work
_log = logging.getLogger(__name__)
Beat = Callable[[], Awaitable[None]]


class SideServer(Protocol):
    """A server that a service has beside its gRPC server."""

    async def start(self, host: str, port: int) -> int:
        """Binds, starts serving and returns the port."""

    async def stop(self, grace_s: float) -> None:
        """Refuses new work at once and gives running work `grace_s` seconds to end."""


@dataclass(frozen=True, slots=True)
class ServiceParts:
    """The parts that differ between expert replicas, routers and gateways; an argument of `ServiceStart.serve`."""

    role: Role
    server: Server
    idle: Callable[[], bool]
    healthy: Callable[[], None] = lambda: None  # raises Unavailable while the service is sick; called every LOOK_S
    reconfigure: Callable[[Mapping[str, Any]], Awaitable[None]] | None = None
    entry: Callable[[Replica], Replica] = lambda replica: replica  # updates the registry entry before each beat
    on_beat: Sequence[Beat] = ()
    port: int = 0  # 0 = a free one
    http: SideServer | None = None
    http_port: int = 0
    listening: AbstractAsyncContextManager[None] = field(default_factory=nullcontext)  # around the start of the servers
    on_drain: Callable[[], None] = lambda: None  # called once, when the service begins to drain
    calls_end: bool = True  # False if its RPCs are streams that stay open as long as the service

    async def stop(self, grace_s: float) -> None:
        """Stops the servers, all at once."""
        servers: list[SideServer] = [self.server, *([self.http] if self.http else [])]
        await asyncio.gather(*(server.stop(grace_s) for server in servers))


class Running:
    """A started service. Call `drain`, then `close`; both may be called again."""

    def __init__(self, parts: ServiceParts, replica: Replica, registry: Registry, closers: AsyncExitStack):
        self._parts, self._replica, self._closers = parts, replica, closers
        self._heartbeat = Heartbeat(registry, lambda: self.replica, on_beat=parts.on_beat, require=True)
        self._draining = False
        self._sick, self._problem = False, ""
        self._loop_progress = Progress(MOST_LATE, inf)
        self._looking: asyncio.Task[None] | None = None

    @property
    def replica(self) -> Replica:
        """The current registry entry."""
        replica = self._parts.entry(self._replica)
        if self._draining:
            return dataclasses.replace(replica, state=ReplicaState.DRAINING)
        return dataclasses.replace(replica, state=ReplicaState.SICK, problem=self._problem) if self._sick else replica

    async def register(self) -> None:
        """Registers and keeps registering. Raises RegistryUnreachable if the registry does not answer at start."""
        await self._heartbeat.start()
        self._looking = supervise("health", self._look)

    @property
    def registered(self) -> bool:
        """Whether the registry took the last heartbeat. If not, the service is still healthy: its peers keep their links."""
        return self._heartbeat.trouble is None

    def healthy(self) -> None:
        """Raises Unavailable while the service is sick: it should be replaced, unless it recovers."""
        TASKS.check()
        if late := self._loop_progress.problem(time.monotonic()):
            raise Unavailable(f"the event loop is blocked again and again: {late}")
        self._parts.healthy()

    async def _look(self) -> None:
        """Keeps health service and registry entry up to date with `healthy`. Logs each change."""
        while True:
            began = time.monotonic()
            self._loop_progress.begin(began)
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if now - began > LOOK_S + LATE_S:
                self._loop_progress.fail(now)
            else:
                self._loop_progress.end(now)
            try:
                self.healthy()
                problem = ""
            except Unavailable as error:
                problem = str(error)
            if self._sick != bool(problem):
                await self._turn_sick(problem)

    async def _turn_sick(self, problem: str) -> None:
        """Tells others that the service is sick because of `problem`, or that it is well again where that is empty."""
        self._sick, self._problem = bool(problem), problem
        if problem:
            _log.error("%s is sick: %s", self._replica.id, problem)
        else:
            _log.warning("%s is well again", self._replica.id)
        await self._parts.server.report(serving=not problem)
        with suppress(RegistryUnreachable):  # the next heartbeat tries again
            await self._heartbeat.beat()

    async def reconfigure(self, values: Mapping[str, Any]) -> None:
        """Applies live settings. Raises ConfigError for one that cannot change while the service runs."""
        if self._parts.reconfigure is not None:
            await self._parts.reconfigure(values)
        elif values:
            raise ConfigError("user_config", dict(values), f"a {self._parts.role} has no live settings")

    async def drain(self, grace_s: float) -> None:
        """Registers as DRAINING, then gives work in flight up to `grace_s` seconds to finish."""
        if self._draining:
            return
        self._draining = True
        self._parts.on_drain()
        if self._sick:  # what is in flight does not finish, and a replacement may wait for the device
            grace_s = min(grace_s, DRAIN_NOTICE_S)
        until = time.monotonic() + grace_s
        with suppress(RegistryUnreachable):  # then calls still arrive: they are refused or sent again
            await self._heartbeat.beat()
        await asyncio.sleep(min(DRAIN_NOTICE_S, grace_s))
        if self._parts.calls_end:
            await self._parts.stop(max(0.0, until - time.monotonic()))
        while not self._parts.idle() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Deregisters, stops at once what still runs, and frees everything."""
        self._draining = True
        if self._looking is not None:
            self._looking.cancel()
        await self._heartbeat.stop()
        await self._parts.stop(0)
        await self._closers.aclose()


class ServiceStart:
    """Starts one service. Holds what every service needs, and closes what it opened if the start fails."""

    def __init__(self, settings: ServiceSettings, replica_id: str, node: str, launched: float | None = None):
        """`launched`: when the start began, imports included, in Unix seconds; None = now."""
        self.settings, self.replica_id, self.node = settings, replica_id, node
        self._launched = time.time() if launched is None else launched
        resource: dict[str, str] = {
            ResourceAttribute.INSTANCE: replica_id,
            ResourceAttribute.VERSION: __version__,
            ResourceAttribute.DEPLOYMENT: settings.deployment,
        }
        self.tracer: Tracer = configure(f"moiety-{settings.deployment}", resource)
        self.meter: Meter = configure_metrics(f"moiety-{settings.deployment}", resource)
        self.checkpoint: Checkpoint
        self.system: SystemId
        self.registry: Registry
        self.meter.observe(MetricName.TASK_FAILURES, TASKS.total_failures)
        self.closers = AsyncExitStack()
        self.closers.push_async_callback(self._end_telemetry)

    async def __aenter__(self) -> ServiceStart:
        """Opens the checkpoint, which completes the system's identity, and the registry. Reads no weight.

        Raises CheckpointError if the checkpoint cannot be read or is another one than the settings name.
        """
        settings = self.settings
        try:
            self.checkpoint = await asyncio.to_thread(Checkpoint.open, settings.model)
            revision = await asyncio.to_thread(pinned_revision, self.checkpoint, settings.verify, settings.revision)
            self.system = dataclasses.replace(settings.system, revision=revision)
            self.registry = connect(settings.registry.get_secret_value(), self.system)
            self.closers.push_async_callback(self.registry.close)
        except BaseException:
            await self.closers.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            await self.closers.aclose()

    def load_beat(self, busy: Callable[[], ReplicaLoad], demand: Callable[[], ExpertDemand] | None = None) -> Beat:
        """Returns an action for `ServiceParts.on_beat` that reports the service's load to the load ledger once a second.

        `busy()` must return the load since the previous `busy()`; the meter exports the latest value. `demand()` returns
        a router's counters; other services leave it out. Both values are sent together.
        """
        latest: ReplicaLoad | None = None
        due = 0.0

        async def publish() -> None:
            nonlocal latest, due
            if (now := time.monotonic()) >= due:
                latest, due = busy(), now + LEDGER_S
                await self.registry.publish_load(self.replica_id, latest, demand() if demand is not None else None)

        self.meter.observe(MetricName.BUSY, lambda: None if latest is None else latest.busy)
        self.meter.observe(MetricName.QUEUE_WAIT, lambda: None if latest is None else latest.queue_wait_ms / 1000)
        return publish

    async def _end_telemetry(self) -> None:
        """Ends tracer and meter concurrently, because each waits for its full timeout if the collector does not answer."""
        await asyncio.gather(*(asyncio.to_thread(exporter.shutdown, 2.0) for exporter in (self.tracer, self.meter)))

    async def serve(self, parts: ServiceParts) -> Running:
        """Binds, registers and returns the running service."""
        settings, http_address = self.settings, ""
        async with parts.listening:
            port = await parts.server.start(settings.listen_host, parts.port)
            self.closers.push_async_callback(parts.stop, 0)
            if parts.http is not None:
                http_port = await parts.http.start(settings.listen_host, parts.http_port)
                http_address = f"{settings.advertised}:{http_port}"
        replica = Replica(
            id=self.replica_id,
            role=parts.role,
            deployment=settings.deployment,
            address=f"{settings.advertised}:{port}",
            node=self.node,
            model=settings.name,
            revision=self.system.revision,
            launched=self._launched,
            started=time.time(),
            pid=os.getpid(),
            http_address=http_address,
            version=__version__,
        )
        running = Running(parts, replica, self.registry, self.closers)
        self.meter.observe(MetricName.REGISTERED, lambda: float(running.registered))
        await running.register()
        await self._name_other_systems()
        return running

    async def _name_other_systems(self) -> None:
        """Logs which other systems of this application are live: an operator may expect one system where there are two."""
        with suppress(RegistryUnreachable):
            for other in await self.registry.systems():
                if difference := self.system.difference(str(other)):
                    _log.warning("the registry also holds %s, which is another system: %s", other, difference)
