"""A service's life cycle, the same for all three kinds: bind, register, beat, drain, close."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from math import inf
from typing import Any

from moiety import __version__
from moiety.compose.departure import DRAIN_NOTICE_S, Departure
from moiety.compose.service_parts import Beat, ServiceParts
from moiety.config.services import ServiceSettings
from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.progress import Progress
from moiety.core.replica import Replica, ReplicaState
from moiety.core.supervise import TASKS, spawn, supervise
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

LEDGER_S = 1.0  # how often a service reports its load
LOOK_S = 0.5  # how often a service looks whether it is healthy
CUT_S = 1.0  # in which clients hear why their work was cut
CLOSE_S = 5.0  # for a thread to end once nobody waits for its work
LATE_S = 2.0  # a look that comes so much later means that the event loop was blocked
MOST_LATE = 3  # looks in a row that may be late
_log = logging.getLogger(__name__)


class Running:
    """A started service. Call `drain`, then `close`; both may be called again."""

    def __init__(
        self,
        parts: ServiceParts,
        replica: Replica,
        registry: Registry,
        closers: AsyncExitStack,
        system: SystemId | None = None,
    ):
        """`system`: the service's own, where the registry may hold several."""
        self._parts, self._replica, self._closers = parts, replica, closers
        self._registry, self._system = registry, system
        self._heartbeat = Heartbeat(registry, lambda: self.replica, on_beat=parts.on_beat, require=True)
        self._draining = False
        self._sick = ""  # why
        self._refused = ""  # why the latest live settings were
        self._loop_progress = Progress(MOST_LATE, inf)
        self._looking: asyncio.Task[None] | None = None

    @property
    def replica(self) -> Replica:
        """The current registry entry."""
        replica = dataclasses.replace(self._parts.entry(self._replica), problem=self._sick or self._refused)
        if self._draining:
            return dataclasses.replace(replica, state=ReplicaState.DRAINING)
        return dataclasses.replace(replica, state=ReplicaState.SICK) if self._sick else replica

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
            if bool(self._sick) != bool(problem):
                await self._turn_sick(problem)

    async def _turn_sick(self, problem: str) -> None:
        """Tells others that the service is sick because of `problem`, or that it is well again where that is empty."""
        self._sick = problem
        if problem:
            _log.error("%s is sick: %s", self._replica.id, problem)
        else:
            _log.warning("%s is well again", self._replica.id)
        await self._parts.server.report(serving=not problem)
        with suppress(RegistryUnreachable):  # the next heartbeat tries again
            await self._heartbeat.beat()

    async def reconfigure(self, values: Mapping[str, Any]) -> None:
        """Applies live settings; one that is left out is as at the start.

        Raises ConfigError for an unknown or wrong one. Then the service goes on with those it had, and its registry entry
        tells why, until it is given others.
        """
        try:
            await self._reconfigure(values)
        except ConfigError as error:
            self._refused = f"live settings refused: {error}"
            raise
        self._refused = ""

    async def _reconfigure(self, values: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError("user_config", values, "must be a mapping of live settings")
        if self._parts.reconfigure is not None:
            await self._parts.reconfigure(values)
        elif values:
            raise ConfigError("user_config", dict(values), f"a {self._parts.role} has no live settings")

    async def drain(self, grace_s: float, *, ending: bool = False) -> None:
        """Registers as DRAINING; returns when nobody needs the service any more, at the latest after `grace_s` seconds.

        It goes on working while others send it work that nobody else can take, and until its work in flight is done.
        `ending`: the whole system ends. Then it has no successor, a gateway refuses new requests at once, and each service
        waits for those that use it: routers for gateways, expert replicas for routers.
        """
        if self._draining:
            return
        self._draining = True
        if self._sick:  # what is in flight does not finish, and a replacement may wait for the device
            grace_s = min(grace_s, DRAIN_NOTICE_S)
        until = time.monotonic() + grace_s
        parts = self._parts
        if ending:
            parts.refuse()
            await parts.server.report(serving=False)
        with suppress(RegistryUnreachable):  # then calls still arrive: they are refused or sent again
            await self._heartbeat.beat()
        await Departure(self._registry, self._system, lambda: self.replica, parts, ending).until_unneeded(until)
        if parts.calls_end:
            stopping = spawn("server stop", parts.stop(max(0.0, until - time.monotonic()) + CUT_S))
            while not (idle := parts.idle()) and time.monotonic() < until:
                await asyncio.sleep(0.02)
            if not idle:
                await parts.cut()
            await asyncio.wait([stopping], timeout=CUT_S)  # what is left then, `close` ends

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
        running = Running(parts, replica, self.registry, self.closers, self.system)
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
