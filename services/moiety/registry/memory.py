"""The registry in a dictionary, with the lifetimes of `redis.py`: the simple twin that tests compare it with."""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica, Role
from moiety.core.system import SystemId
from moiety.registry.interface import DECISIONS_KEPT, DEMAND_TTL_S, LOAD_TTL_S, MISSING_EXPERTS_TTL_S, TTL_S

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class MemoryRegistry:
    """A registry within one process. It is always reachable."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._generations = itertools.count(1)
        self.clear()

    def clear(self) -> None:
        """Removes everything, like a flush or a restart of Redis."""
        self._replicas: _Expiring[str, Replica] = _Expiring(TTL_S, self._clock)
        self._demand: _Expiring[str, ExpertDemand] = _Expiring(DEMAND_TTL_S, self._clock)
        self._busy: _Expiring[str, ReplicaLoad] = _Expiring(LOAD_TTL_S, self._clock)
        self._missing: _Expiring[tuple[int, int], None] = _Expiring(MISSING_EXPERTS_TTL_S, self._clock)
        self._placement: Placement | None = None
        self._decisions: deque[str] = deque(maxlen=DECISIONS_KEPT)
        self._generation: str | None = None

    async def register(self, replica: Replica) -> None:
        self._replicas.set(replica.id, replica)
        self._generation = self._generation or str(next(self._generations))

    async def deregister(self, replica_id: str) -> None:
        self._replicas.remove(replica_id)

    async def check_writes(self) -> None:
        """Does nothing: a dictionary takes every write."""

    async def replicas(self) -> tuple[Replica, ...]:
        return tuple(replica for _, replica in sorted(self._replicas.live().items()))

    async def routers(self) -> tuple[Replica, ...]:
        return tuple(replica for replica in await self.replicas() if replica.role is Role.ROUTER)

    async def generation(self) -> str | None:
        return self._generation

    async def placement(self) -> Placement | None:
        return self._placement

    async def placement_epoch(self) -> int:
        placement = await self.placement()
        return 0 if placement is None else placement.epoch

    async def set_placement(self, placement: Placement) -> bool:
        if self._placement is not None and placement.epoch != self._placement.epoch + 1:
            return False
        self._placement = placement
        return True

    async def publish_load(
        self, replica_id: str, busy: ReplicaLoad | None = None, demand: ExpertDemand | None = None
    ) -> None:
        if busy is not None:
            self._busy.set(replica_id, busy)
        if demand is not None:
            self._demand.set(replica_id, demand)

    async def expert_demand(self) -> Mapping[str, ExpertDemand]:
        return self._demand.live()

    async def replica_load(self) -> Mapping[str, ReplicaLoad]:
        return self._busy.live()

    async def report_missing_experts(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self._missing.set((layer, expert), None)

    async def missing_experts(self) -> Mapping[int, frozenset[int]]:
        missing: dict[int, frozenset[int]] = {}
        for layer, expert in self._missing.live():
            missing[layer] = missing.get(layer, frozenset()) | {expert}
        return missing

    async def record_decision(self, decision: Mapping[str, Any]) -> None:
        self._decisions.append(json.dumps(decision))

    async def decisions(self, count: int = 100) -> Sequence[Mapping[str, Any]]:
        skipped = max(0, len(self._decisions) - count)
        return [json.loads(text) for text in itertools.islice(self._decisions, skipped, None)]

    async def systems(self) -> tuple[SystemId, ...]:
        return ()  # the store holds one system, and does not know its name

    async def forget(self) -> bool:
        if await self.replicas():
            return False
        self.clear()
        return True

    async def close(self) -> None: ...


class _Expiring(Generic[K, V]):
    """A dictionary that drops an entry `ttl_s` seconds after it was last set."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s, self._clock = ttl_s, clock
        self._entries: dict[K, tuple[float, V]] = {}

    def set(self, key: K, value: V) -> None:
        self._entries[key] = (self._clock() + self._ttl_s, value)

    def remove(self, key: K) -> None:
        self._entries.pop(key, None)

    def live(self) -> dict[K, V]:
        now = self._clock()
        self._entries = {key: entry for key, entry in self._entries.items() if entry[0] > now}
        return {key: value for key, (_, value) in self._entries.items()}
