"""The registry (who is where) and the load ledger (how hot): one interface, three implementations.

`memory.py` is the naive twin the others are tested against, `redis.py` the real one, and `file.py`
serves a `LocalCluster` on machines without Redis: its parent process is the only writer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica

HEARTBEAT_S = 0.5  # every replica registers this often
TTL_S = 3.0  # and is forgotten after this long without
BUSY_TTL_S = 5.0
MISSING_EXPERTS_TTL_S = 5.0
DEMAND_TTL_S = 60.0  # counters are cumulative: a reader must see the last flush of a router that is slow to write
DECISIONS_KEPT = 1000


class Registry(Protocol):
    """Every method raises RegistryUnreachable when the store does not answer; callers go on with what they knew."""

    async def register(self, replica: Replica) -> None:
        """Puts `replica` there for TTL_S: at start and by every heartbeat, so an emptied store refills itself.

        What the store has already need not be sent again; another replica under the same id replaces it.
        """
        ...

    async def deregister(self, replica_id: str) -> None: ...

    async def replicas(self) -> tuple[Replica, ...]:
        """All live replicas, sorted by id. Expired ones are pruned."""
        ...

    async def routers(self) -> tuple[Replica, ...]:
        """The routers among `replicas`: for those who would read thousands of others with them."""
        ...

    async def generation(self) -> str | None:
        """Names the store's contents: another value, or None, means that it was emptied since (see `watch.py`).

        None until the first `register`. Read it after `replicas`, not before: then a store emptied in between is seen.
        """
        ...

    async def placement(self) -> Placement | None:
        """The placement in force, or None while the deterministic default plan is."""
        ...

    async def placement_epoch(self) -> int:
        """That of the placement in force, 0 where there is none: every replica asks for it at every beat."""
        ...

    async def set_placement(self, placement: Placement) -> bool:
        """Compare-and-set: stored only if its epoch is one more than that in force, or if none is in force: the store
        may have been emptied, and replicas follow higher epochs only.

        After RegistryUnreachable it may have been stored all the same: read `placement` before proposing again.
        """
        ...

    async def publish_load(
        self, replica_id: str, busy: ReplicaLoad | None = None, demand: ExpertDemand | None = None
    ) -> None:
        """What a service says of its load once a second, in one round trip: how busy it was, a router its counters too.

        One key for each of the two; counters are cumulative: a flush repeated is a flush done once.
        """
        ...

    async def expert_demand(self) -> Mapping[str, ExpertDemand]:
        """Writer id -> its latest counters."""
        ...

    async def replica_load(self) -> Mapping[str, ReplicaLoad]:
        """Replica id -> its load over the last window; entries expire after 5 s."""
        ...

    async def report_missing_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Records that requests wait for experts no live replica holds; the entry expires after 5 s."""
        ...

    async def missing_experts(self) -> Mapping[int, frozenset[int]]:
        """MoE layer -> experts waited for."""
        ...

    async def record_decision(self, decision: Mapping[str, Any]) -> None:
        """Appends to a bounded log (1,000 entries) of scaling decisions; values are JSON-able."""
        ...

    async def decisions(self, count: int = 100) -> Sequence[Mapping[str, Any]]:
        """The newest `count` (at least 1) decisions, oldest first."""
        ...

    async def close(self) -> None: ...
