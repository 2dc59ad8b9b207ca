"""What the registry says of one system at one moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moiety.config.registry_url import without_secrets
from moiety.core.load import ReplicaLoad
from moiety.core.replica import Placement, Replica, Role
from moiety.registry.connect import connect
from moiety.tools.running.find import FoundSystem
from moiety.tools.running.logs import RAY_FOLDER


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A system at one moment. Loads are by replica id; decisions are oldest first."""

    found: FoundSystem
    time: float  # Unix seconds
    replicas: tuple[Replica, ...] = ()
    loads: Mapping[str, ReplicaLoad] = field(default_factory=dict)
    placement: Placement | None = None
    decisions: Sequence[Mapping[str, Any]] = ()

    @property
    def deployments(self) -> dict[str, list[Replica]]:
        """Deployment -> its live replicas, oldest first. Those that the placement names are there without a replica, too."""
        names = {replica.deployment for replica in self.replicas}
        if self.placement is not None:
            names |= self.placement.held.keys()
        found = {name: [one for one in self.replicas if one.deployment == name] for name in sorted(names, key=_order)}
        return {name: sorted(live, key=lambda one: (one.started, one.id)) for name, live in found.items()}

    @property
    def logs(self) -> str:
        """Where the logs are: a folder on this machine, or a pattern that holds on each node."""
        if self.found.local is not None and self.found.local.logs:
            return self.found.local.logs
        session = self.found.system.cluster if self.found.system is not None else "session_latest"
        return f"{RAY_FOLDER}/{session}/logs"

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON types; times are Unix seconds. The registry's URL lacks its secrets."""
        found = self.found
        return {
            "time": self.time,
            "system": str(found.system) if found.system else None,
            "registry": without_secrets(found.url),
            "local": {**asdict(found.local), "registry": without_secrets(found.local.registry)}
            if found.local
            else None,
            "logs": self.logs,
            "deployments": {
                name: [self._replica_json(replica) for replica in live] for name, live in self.deployments.items()
            },
            "placement": self.placement
            and {
                "epoch": self.placement.epoch,
                "held": {name: str(experts) for name, experts in self.placement.held.items()},
            },
            "decisions": list(self.decisions),
        }

    def _replica_json(self, replica: Replica) -> dict[str, Any]:
        load = self.loads.get(replica.id)
        texts = {"held": str(replica.held), "leaving": str(replica.leaving), "scaling": dict(replica.scaling)}
        values = {name: getattr(replica, name) for name in replica.__slots__}
        return {**values, **texts, "load": asdict(load) if load else None}


async def read_snapshot(found: FoundSystem, decisions: int) -> Snapshot:
    """Reads the registry of the system that was found. Raises RegistryUnreachable."""
    if found.system is None:
        return Snapshot(found, time.time())
    registry = connect(found.url, found.system)
    try:
        replicas, loads, placement, last = await asyncio.gather(
            registry.replicas(), registry.replica_load(), registry.placement(), registry.decisions(decisions)
        )
    finally:
        await registry.close()
    return Snapshot(found, time.time(), replicas, loads, placement, last)


def _order(deployment: str) -> tuple[int, str, int]:
    """Sorts gateways first, then routers, groups and hot sets by their number."""
    kind, _, number = deployment.rpartition("-")
    place = [Role.GATEWAY, Role.ROUTER].index(Role(deployment)) if deployment in tuple(Role) else 2
    return place, kind, int(number) if number.isdigit() else 0
