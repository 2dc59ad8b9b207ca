"""The registry (live replicas, placement) and the load ledger (what they report of their load): one interface.

It has three implementations. `redis.py` is the one for clusters. `memory.py` is the simple twin that tests compare it with.
`file.py` serves a `LocalCluster` on machines without Redis: its parent process is the only writer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica

HEARTBEAT_S = 0.5  # every replica registers this often
TTL_S = 3.0  # a replica that has not registered for this long is removed
LOAD_TTL_S = 5.0
MISSING_EXPERTS_TTL_S = 5.0
DEMAND_TTL_S = 60.0  # counters are cumulative: a reader must see the last flush of a router that writes slowly
DECISIONS_KEPT = 1000


class Registry(Protocol):
    """Every method raises RegistryUnreachable when the store does not answer; callers then keep what they last read."""

    async def register(self, replica: Replica) -> None:
        """Stores `replica` for TTL_S. Called at start and at every heartbeat, so an emptied store refills itself.

        An implementation need not send again what the store already has. Another replica with the same id replaces it.
        """
        ...

    async def deregister(self, replica_id: str) -> None: ...

    async def replicas(self) -> tuple[Replica, ...]:
        """Returns all live replicas, sorted by id, and prunes expired ones."""
        ...

    async def routers(self) -> tuple[Replica, ...]:
        """Returns only the routers among `replicas`: a reader need not fetch thousands of other replicas for them."""
        ...

    async def generation(self) -> str | None:
        """Returns a name of the store's contents: another value, or None, means that it was emptied since (see `watch.py`).

        It is None until the first `register`. Read it after `replicas`, not before: then emptying in between is noticed.
        """
        ...

    async def placement(self) -> Placement | None:
        """Returns the placement in force, or None while the deterministic default plan is in force."""
        ...

    async def placement_epoch(self) -> int:
        """Returns the epoch of the placement in force, 0 if there is none. Every replica reads it at every beat."""
        ...

    async def set_placement(self, placement: Placement) -> bool:
        """Stores `placement` if its epoch is one more than the epoch in force (compare-and-set); returns whether it did.

        If no placement is in force, any epoch is stored: the store may have been emptied, and replicas follow only
        higher epochs. After RegistryUnreachable it may have been stored all the same: read `placement` before you
        propose again.
        """
        ...

    async def publish_load(
        self, replica_id: str, busy: ReplicaLoad | None = None, demand: ExpertDemand | None = None
    ) -> None:
        """Stores the load that a service reports once a second, in one round trip; a router adds its counters.

        Load and counters have a key each. Counters are cumulative, so a repeated flush counts once.
        """
        ...

    async def expert_demand(self) -> Mapping[str, ExpertDemand]:
        """Returns writer id -> its latest counters."""
        ...

    async def replica_load(self) -> Mapping[str, ReplicaLoad]:
        """Returns replica id -> its load over the last window; entries expire after 5 s."""
        ...

    async def report_missing_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Records that requests wait for experts that no live replica holds; the record expires after 5 s."""
        ...

    async def missing_experts(self) -> Mapping[int, frozenset[int]]:
        """Returns MoE layer -> experts that requests wait for."""
        ...

    async def record_decision(self, decision: Mapping[str, Any]) -> None:
        """Appends to a bounded log (1,000 entries) of scaling decisions; values are JSON-able."""
        ...

    async def decisions(self, count: int = 100) -> Sequence[Mapping[str, Any]]:
        """Returns the newest `count` (at least 1) decisions, oldest first."""
        ...

    async def close(self) -> None: ...
