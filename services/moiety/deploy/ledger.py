"""Reads the registry as the autoscaler needs it: one snapshot per deployment, or the word that nothing can be trusted."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moiety.core import Busy, Demand, ExpertSet, Placement, Replica, ReplicaState, Role
from moiety.errors import RegistryUnreachable
from moiety.load.rates import rates
from moiety.load.registry import Registry
from moiety.load.watch import Watch
from moiety.policy.autoscale import Snapshot

WINDOW_S = 3.0  # routers flush their counters every second


@dataclass(frozen=True, slots=True)
class Reading:
    """The registry at one moment."""

    stale: bool
    replicas: tuple[Replica, ...] = ()
    busy: Mapping[str, Busy] = field(default_factory=dict)
    rows_per_s: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))  # [moe_layers][experts]
    wakes: Mapping[int, frozenset[int]] = field(default_factory=dict)
    placement: Placement | None = None

    def snapshot(self, deployment: str, target: int, default: ExpertSet) -> Snapshot:
        """What is known of `deployment`, which holds `default` where the placement in force does not name it."""
        held = default if self.placement is None else self.placement.held.get(deployment, default)
        live = [
            replica
            for replica in self.replicas
            if (replica.deployment, replica.state) == (deployment, ReplicaState.READY)
        ]
        loads = [self.busy[replica.id] for replica in live if replica.id in self.busy]
        return Snapshot(
            deployment=deployment,
            target=target,
            live=len(live),
            reporting=len(loads),
            busy=sum(load.busy for load in loads) / max(len(loads), 1),
            queue_wait_ms=max((load.queue_wait_ms for load in loads), default=0.0),
            rows_per_s=max(self._asked(held), sum(load.rows_per_s for load in loads)),
            wake=self._waited_for(held),
            stale=self.stale,
        )

    def _waited_for(self, held: ExpertSet) -> bool:
        """Whether requests wait for one of `held`, or a router does: it is not ready before it has seen every expert."""
        if any((replica.role, replica.state) == (Role.ROUTER, ReplicaState.STARTING) for replica in self.replicas):
            return len(held) > 0
        return any(experts & held.layer(layer) for layer, experts in self.wakes.items())

    def _asked(self, held: ExpertSet) -> float:
        """Rows per second that the routers send to `held`, whichever replica computes them."""
        layers, experts = self.rows_per_s.shape
        return sum(
            float(self.rows_per_s[layer, [expert for expert in ids if expert < experts]].sum())
            for layer, ids in held.by_layer.items()
            if layer < layers
        )


class Ledger:
    """Readings of one system's registry, with the history that rates need."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._watch = Watch(registry)
        self._history: deque[tuple[float, Mapping[str, Demand]]] = deque()

    async def read(self) -> Reading:
        """A reading as of now; `stale` where the registry does not answer. Never raises for an outage."""
        await self._watch.poll()
        if self._watch.stale_since is not None:
            return Reading(stale=True)
        try:
            busy, demand, wakes, placement = await asyncio.gather(
                self._registry.busy(), self._registry.demand(), self._registry.wakes(), self._registry.placement()
            )
        except RegistryUnreachable:
            return Reading(stale=True)
        return Reading(False, self._watch.replicas, busy, self._rates(demand), wakes, placement)

    def _rates(self, newest: Mapping[str, Demand]) -> npt.NDArray[np.float64]:
        now = time.monotonic()
        self._history.append((now, newest))
        while len(self._history) > 1 and self._history[1][0] <= now - WINDOW_S:
            self._history.popleft()
        return rates(self._history[0][1], newest)
