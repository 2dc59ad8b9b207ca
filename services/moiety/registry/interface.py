"""The interface of the registry (live replicas, placement) and of the load ledger (the load that replicas report).

It has three implementations. `redis.py` is the one for clusters. `memory.py` is the simple twin that tests compare it with.
`file.py` serves a `LocalCluster` on machines without Redis: its parent process is the only writer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica
from moiety.core.system import SystemId

HEARTBEAT_S = 0.5  # every replica registers this often
TTL_S = 3.0  # a replica that has not registered for this long is removed
LOAD_TTL_S = 5.0
MISSING_EXPERTS_TTL_S = 5.0
DEMAND_TTL_S = 60.0  # counters are cumulative: a reader must see the last flush of a router that writes slowly
DECISIONS_KEPT = 1000
SYSTEM_TTL_S = 24 * 3600.0  # what a system leaves behind is deleted this long after its last sign of life


class Registry(Protocol):
    """Stores one system's live replicas, its placement and its load ledger.

    A store may hold several systems. Each has a registry of its own, in which the others' entries do not exist.

    Every method except `close` raises RegistryUnreachable if the store does not answer. Callers then keep what they last read.
    """

    async def register(self, replica: Replica) -> None:
        """Stores `replica` for TTL_S. Called at start and at every heartbeat, so an emptied store refills itself.

        An entry that the store already has need not be sent again. A newer entry replaces an older one of the same id.
        If this raises WritesRefused, an older entry of the same id was still renewed, where the store allows that.
        """
        ...

    async def deregister(self, replica_id: str) -> None: ...

    async def check_writes(self) -> None:
        """Raises WritesRefused if the store refuses writes now. Then an entry that has expired proves nothing."""
        ...

    async def replicas(self) -> tuple[Replica, ...]:
        """Returns all live replicas, sorted by id, and prunes expired ones."""
        ...

    async def routers(self) -> tuple[Replica, ...]:
        """Returns the live routers, sorted by id, without fetching the other replicas, which may be thousands."""
        ...

    async def generation(self) -> str | None:
        """Returns an id of the store's contents. If it changes, or becomes None, the store was emptied (see `watch.py`).

        The id is None until the first `register`. Call `replicas` first: then you notice if the store is emptied
        between the two calls.
        """
        ...

    async def placement(self) -> Placement | None:
        """Returns the placement in force, or None. Without a placement, an expert replica starts with its default."""
        ...

    async def placement_epoch(self) -> int:
        """Returns the epoch of the placement in force, or 0 without one. Expert replicas read the epoch at every beat."""
        ...

    async def set_placement(self, placement: Placement) -> bool:
        """Stores `placement` if its epoch is one more than the epoch in force (compare-and-set); returns whether it is stored.

        If no placement is in force, for example because the store was emptied, any epoch is accepted. Replicas ignore an
        epoch that is not above the epoch they follow. After RegistryUnreachable, `placement` may or may not be stored:
        call `placement()` before you try again.
        """
        ...

    async def publish_load(
        self, replica_id: str, busy: ReplicaLoad | None = None, demand: ExpertDemand | None = None
    ) -> None:
        """Stores a service's load, `busy`, and a router's counters, `demand`. Services call this once a second.

        Both travel together, to separate keys. Counters are cumulative, so a repeated report counts once.
        """
        ...

    async def expert_demand(self) -> Mapping[str, ExpertDemand]:
        """Returns router's replica id -> the counters that this router reported last."""
        ...

    async def replica_load(self) -> Mapping[str, ReplicaLoad]:
        """Returns replica id -> the load that this replica reported last; reports expire after 5 s."""
        ...

    async def report_missing_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Records that no live replica holds `experts` of MoE layer `layer`, which requests need. Expires after 5 s."""
        ...

    async def missing_experts(self) -> Mapping[int, frozenset[int]]:
        """Returns MoE layer -> the experts that were reported missing in the last 5 s."""
        ...

    async def record_decision(self, decision: Mapping[str, Any]) -> None:
        """Appends `decision`, whose values must be JSON types, to the decision log. The log keeps the last 1,000."""
        ...

    async def decisions(self, count: int = 100) -> Sequence[Mapping[str, Any]]:
        """Returns the newest `count` (at least 1) decisions, oldest first."""
        ...

    async def systems(self) -> tuple[SystemId, ...]:
        """Returns the systems of the same application that have a live replica in this store, this one included."""
        ...

    async def forget(self) -> bool:
        """Deletes all that the system left in the store, unless a replica of it is live; returns whether none is.

        For a system that was ended on purpose. What others leave expires, see SYSTEM_TTL_S.
        """
        ...

    async def close(self) -> None: ...
