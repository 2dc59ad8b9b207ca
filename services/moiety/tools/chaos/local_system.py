"""The system of a trial as a LocalCluster: two holders of each expert and two routers, every TCP connection through a relay.

One router reaches the experts through shared memory, the other through gRPC, so each fault meets both transports.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from moiety.client import Client
from moiety.core.address import split
from moiety.core.replica import Replica, ReplicaState, Role, Transport
from moiety.core.supervise import supervise
from moiety.core.system import SystemId
from moiety.errors import FailedPrecondition, MoietyError, Unavailable
from moiety.local.child_process import Child
from moiety.local.cluster import LocalCluster
from moiety.registry.interface import Registry
from moiety.tools.chaos.redis_server import RedisServer
from moiety.tools.chaos.relay import RELAYED, Relay

POLL_S = 0.02
REPAIR_S = 60.0
TRANSPORTS = (Transport.AUTO, Transport.GRPC)  # of the routers, in turn


class LocalSystem:
    """A `System` (`fault.py`) on a LocalCluster."""

    def __init__(
        self,
        cluster: LocalCluster,
        redis: RedisServer,
        redis_relay: Relay,
        folder: Path,
        *,
        replicas: int,
        routers: int,
    ) -> None:
        self.redis, self.folder = redis, folder
        self.redis_relay: Relay | None = redis_relay
        self._cluster, self._replicas, self._routers = cluster, replicas, routers
        self._relays: dict[int, Relay] = {}  # by the process id of the service behind it
        self._transports: dict[str, Transport] = {}  # of the live routers, by id

    @classmethod
    @asynccontextmanager
    async def started(
        cls, model: str, redis: RedisServer, folder: Path, *, groups: int, replicas: int, routers: int, kv_memory: int
    ) -> AsyncIterator[LocalSystem]:
        """Serves `model` with `groups` groups of `replicas` replicas each. `folder` gets what the services write.

        `kv_memory` is a router's, in bytes.
        """
        relay = Relay(redis.port)
        await relay.start()
        try:
            with _temporary_files_in(folder):
                cluster = LocalCluster(
                    model,
                    groups=groups,
                    dtype="float32",
                    registry=f"redis://{RELAYED}:{relay.port}/0",
                    expert={"advertise_host": RELAYED},
                    router={"advertise_host": RELAYED, "kv_memory": kv_memory},
                    env={"MOIETY_CACHE": str(folder / "cache")},
                )
            system = cls(cluster, redis, relay, folder, replicas=replicas, routers=routers)
            relaying = supervise("chaos relays", system._relay_children)
            try:
                async with cluster:
                    system._transports[cluster.router().replica.id] = Transport.AUTO
                    await system.repair()
                    yield system
            finally:
                relaying.cancel()
                for each in system._relays.values():
                    await each.close()
        finally:
            await relay.close()

    @property
    def address(self) -> str:
        return self._cluster.address

    @property
    def registry(self) -> Registry:
        return self._cluster.registry

    @property
    def system(self) -> SystemId:
        return self._cluster.system

    def replicas(self, role: Role) -> Sequence[Replica]:
        return [child.replica for child in self._cluster.children if child.replica.role is role]

    def relay(self, replica: Replica) -> Relay:
        return self._relays[replica.pid]

    async def set_fault(self, replica: Replica, fault: str) -> None:
        await self._cluster.set_fault(self._child(replica), fault)

    async def add_expert(self, prefix: Sequence[str], **settings: Any) -> Replica:
        return (await self._cluster.add_expert(0, prefix=prefix, **settings)).replica

    async def remove(self, replica: Replica) -> None:
        with suppress(FailedPrecondition, ProcessLookupError):  # it has ended already
            child = self._child(replica)
            child.signal(signal.SIGKILL)
            await child.ended()

    async def repair(self) -> None:
        missing = [
            self._cluster.add_expert(group)
            for group in range(self._cluster.groups)
            for _ in range(self._replicas - len(self._cluster.experts(group)))
        ]
        live = {replica.id for replica in self.replicas(Role.ROUTER)}
        self._transports = {name: used for name, used in self._transports.items() if name in live}
        await asyncio.gather(*missing)
        while len(self._transports) < self._routers:
            await self._add_router()
        until = time.monotonic() + REPAIR_S
        async with Client(self.address) as client:
            while lacking := await self._lacking():
                if time.monotonic() > until:
                    raise Unavailable(f"{REPAIR_S:g} s after a fault {'; '.join(lacking)}")
                with suppress(MoietyError):
                    await client.models()  # a gateway dials a new router when it needs one
                await asyncio.sleep(POLL_S)

    async def _add_router(self) -> None:
        """Adds a router with the transport that fewest routers use."""
        used = list(self._transports.values())
        transport = min(TRANSPORTS, key=used.count)
        child = await self._cluster.add_router(transport=transport)
        self._transports[child.replica.id] = transport

    async def _lacking(self) -> list[str]:
        """Returns what is missing: every service is to be listed as READY and reached by those that call it."""
        ready = {r.id for r in await self.registry.replicas() if r.state is ReplicaState.READY}
        lacking = []
        for replica in (child.replica for child in self._cluster.children):
            if replica.id not in ready:
                lacking.append(f"{replica.id} is not ready")
            elif (have := self._connections(replica)) < (want := self._callers(replica)):
                lacking.append(f"{replica.id} has {have} of {want} connections")
        return lacking

    def _connections(self, replica: Replica) -> int:
        relay = self._relays.get(replica.pid)
        return relay.connections if relay is not None else 0

    def _callers(self, replica: Replica) -> int:
        """Returns how many services keep a connection to `replica`, through its relay.

        A router that reaches an expert replica over shared memory opens one only when it asks for a description.
        """
        over_grpc = sum(used is Transport.GRPC for used in self._transports.values())
        return {Role.EXPERT: over_grpc, Role.ROUTER: 1, Role.GATEWAY: 0}[replica.role]

    async def _relay_children(self) -> None:
        """Gives each new service that advertises RELAYED a relay, and takes away those of services that have ended."""
        while True:
            live = {child.replica.pid: child.replica for child in self._cluster.children}
            for pid, replica in live.items():
                host, port = split(replica.address)
                if pid not in self._relays and host == RELAYED:
                    relay = Relay(port)
                    await relay.start()  # if that fails, it is tried again
                    self._relays[pid] = relay
            for pid in self._relays.keys() - live.keys():
                await self._relays.pop(pid).close()
            await asyncio.sleep(POLL_S)

    def _child(self, replica: Replica) -> Child:
        for child in self._cluster.children:
            if child.replica.id == replica.id:
                return child
        raise FailedPrecondition(f"{replica.id} has ended")


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Makes `tempfile` use `folder`, where the cluster then keeps its logs."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
