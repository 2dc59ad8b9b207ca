"""The system of a trial as an application of Ray Serve, on a Ray of its own. Serve replaces what is killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ByteSize

from moiety.config.application import AppSettings, ExpertDeployment, GatewayDeployment, RouterDeployment
from moiety.config.registry_url import RegistryUrl
from moiety.core.replica import Replica, ReplicaState, Role
from moiety.core.system import SystemId
from moiety.deploy.ray_cluster import environment
from moiety.deploy.run import DeployedApp, deploy_app
from moiety.errors import FailedPrecondition, Unavailable
from moiety.registry.connect import connect
from moiety.registry.interface import Registry
from moiety.registry.watch import Watch
from moiety.tools.chaos.redis_server import RedisServer
from moiety.tools.chaos.relay import Relay

REPAIR_S = 120.0  # Serve notices a lost replica within two seconds; starting another takes ten
POLL_S = 0.1


@contextmanager
def deployed(
    model: str,
    redis: RedisServer,
    folder: Path,
    *,
    groups: int,
    replicas: int,
    routers: int,
    kv_memory: int,
    say: Callable[[str], None],
) -> Iterator[DeployedApp]:
    """Serves `model` on a Ray that this process starts; `folder` gets Ray's logs and sockets, so its path must be short."""
    settings = AppSettings(
        app="chaos",
        model=model,
        dtype="float32",
        groups=groups,
        registry=RegistryUrl(redis.url),
        gateway=GatewayDeployment(port=0, http_port=0),
        router=RouterDeployment(
            min_replicas=routers, max_replicas=routers, num_cpus=0.1, kv_memory=ByteSize(kv_memory)
        ),
        experts=ExpertDeployment(min_replicas=replicas, max_replicas=replicas, num_cpus=0.1),
    )
    with (
        environment({"MOIETY_CACHE": str(folder / "cache")}),
        deploy_app(settings, progress=say, ray_folder=folder / "ray") as application,
    ):
        yield application


class RaySystem:
    """A `System` (`fault.py`) on Ray. Its services are those that the registry lists."""

    def __init__(
        self, application: DeployedApp, registry: Registry, watch: Watch, redis: RedisServer, folder: Path, size: int
    ) -> None:
        self.redis, self.folder = redis, folder
        self.redis_relay: Relay | None = None
        self._application, self._registry, self._watch, self._size = application, registry, watch, size

    @classmethod
    @asynccontextmanager
    async def of(cls, application: DeployedApp, redis: RedisServer, folder: Path) -> AsyncIterator[RaySystem]:
        """Makes the running `application` a System."""
        registry = connect(redis.url, application.system)
        watch = Watch(registry)
        await watch.start()
        try:
            yield cls(application, registry, watch, redis, folder, len(watch.replicas))
        finally:
            await watch.stop()
            await registry.close()

    @property
    def address(self) -> str:
        return self._application.gateways[0]

    @property
    def registry(self) -> Registry:
        return self._registry

    @property
    def system(self) -> SystemId:
        return self._application.system

    def replicas(self, role: Role) -> Sequence[Replica]:
        return [replica for replica in self._live() if replica.role is role]

    def relay(self, replica: Replica) -> Relay:
        self._refuse("relays")

    async def set_fault(self, replica: Replica, fault: str) -> None:
        self._refuse("faults of a single device")

    async def add_expert(self, prefix: Sequence[str], **settings: Any) -> Replica:
        self._refuse("replicas outside Serve")

    async def remove(self, replica: Replica) -> None:
        self._refuse("replicas outside Serve")

    async def repair(self) -> None:
        until = time.monotonic() + REPAIR_S
        while (ready := sum(replica.state is ReplicaState.READY for replica in self._live())) < self._size:
            if time.monotonic() > until:
                raise Unavailable(f"{REPAIR_S:g} s after a fault {ready} of {self._size} services are ready")
            await asyncio.sleep(POLL_S)

    def _live(self) -> list[Replica]:
        """The services that the registry lists and whose processes live: a killed one stays listed for a moment."""
        return [replica for replica in self._watch.replicas if Path(f"/proc/{replica.pid}").exists()]

    def _refuse(self, what: str) -> NoReturn:
        raise FailedPrecondition(f"a system on Ray has no {what}")
