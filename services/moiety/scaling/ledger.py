"""Reads the registry as the autoscaler needs it: one snapshot per deployment, or the word that nothing can be trusted."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moiety.core.experts import ExpertSet
from moiety.core.load import BatchCost, ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica, ReplicaState, Role
from moiety.errors import RegistryUnreachable
from moiety.policy.autoscale import Snapshot
from moiety.registry.interface import Registry
from moiety.registry.rates import WINDOW_S, latest_costs, rates
from moiety.registry.watch import Watch
from moiety.scaling.expert_load import cost_model_of

Rates = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reading:
    """The registry at one moment."""

    stale: bool
    replicas: tuple[Replica, ...] = ()
    busy: Mapping[str, ReplicaLoad] = field(default_factory=dict)
    rows_per_s: Rates = field(default_factory=lambda: np.zeros((0, 0)))  # [moe_layers][experts]
    activations_per_s: Rates = field(default_factory=lambda: np.zeros((0, 0)))  # [moe_layers][experts]
    costs: BatchCost | None = None  # of a batch, as the routers have fitted them
    missing_experts: Mapping[int, frozenset[int]] = field(default_factory=dict)
    placement: Placement | None = None

    def snapshot(self, deployment: str, target: int, default: ExpertSet, *, spare: bool = False) -> Snapshot:
        """What is known of `deployment`, which holds `default` where the placement in force does not name it.

        `spare`: a hot set, whose experts other deployments hold too.
        """
        held = default if self.placement is None else self.placement.held.get(deployment, default)
        live = self._live(deployment)
        loads = [self.busy[replica.id] for replica in live if replica.id in self.busy]
        return Snapshot(
            deployment=deployment,
            target=target,
            live=len(live),
            reporting=len(loads),
            busy=sum(load.busy for load in loads) / max(len(loads), 1),
            queue_wait_ms=max((load.queue_wait_ms for load in loads), default=0.0),
            rows_per_s=max(_total(self.rows_per_s, held), sum(load.rows_per_s for load in loads)),
            missing_experts=self._waited_for(held, spare),
            stale=self.stale,
            fixed=self._fixed(held, loads),
            spare=spare,
            asked=self._asked(held) if spare else 0.0,
        )

    def scaling(self, deployment: str) -> Mapping[str, float] | None:
        """Live settings, as the youngest of its replicas tells; None where none is live."""
        live = self._live(deployment)
        return max(live, key=lambda replica: replica.started).scaling if live else None

    def _live(self, deployment: str) -> list[Replica]:
        ready = (deployment, ReplicaState.READY)
        return [replica for replica in self.replicas if (replica.deployment, replica.state) == ready]

    def _waited_for(self, held: ExpertSet, spare: bool) -> bool:
        """Whether requests wait for one of `held`, or a router does: it is not ready before it has seen every expert."""
        starting = any((each.role, each.state) == (Role.ROUTER, ReplicaState.STARTING) for each in self.replicas)
        if starting and not spare:
            return len(held) > 0
        return any(experts & held.layer(layer) for layer, experts in self.missing_experts.items())

    def _fixed(self, held: ExpertSet, loads: Sequence[ReplicaLoad]) -> float:
        """The part of these replicas' work that more of them would not share."""
        batches, rows = sum(load.calls_per_s for load in loads), sum(load.rows_per_s for load in loads)
        if self.costs is None or not batches:
            return 0.0
        weights = self.costs.expert_bytes * _total(self.activations_per_s, held)
        return cost_model_of(self.costs).fixed_share(weights / batches, rows / batches)

    def _asked(self, held: ExpertSet) -> float:
        """How busy one more holder of `held` would be: its share of their rows, beside those that hold them now."""
        if self.costs is None:
            return 0.0
        experts = [each for each in self.replicas if each.role is Role.EXPERT and each.state is ReplicaState.READY]
        busy = 0.0
        for layer, ids in held.by_layer.items():
            one = ExpertSet({layer: ids})
            holders = sum(len(each.held.layer(layer) & ids) for each in experts) / len(ids)
            activations = _total(self.activations_per_s, one)
            batches = max(
                (_total(self.activations_per_s, ExpertSet({layer: frozenset({e})})) for e in ids), default=0.0
            )
            weights, rows = self.costs.expert_bytes * activations, _total(self.rows_per_s, one)
            busy += cost_model_of(self.costs).busy(batches, weights, rows) / (holders + 1)
        return busy


def _total(per_s: Rates, held: ExpertSet) -> float:
    """What `per_s` says of `held`, summed; experts that it does not know count nothing."""
    layers, experts = per_s.shape
    return sum(
        float(per_s[layer, [expert for expert in ids if expert < experts]].sum())
        for layer, ids in held.by_layer.items()
        if layer < layers
    )


class Ledger:
    """Readings of one system's registry, with the history that rates need."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._watch = Watch(registry)
        self._history: deque[tuple[float, Mapping[str, ExpertDemand]]] = deque()

    async def read(self) -> Reading:
        """A reading as of now; `stale` where the registry does not answer. Never raises for an outage."""
        await self._watch.poll()
        if self._watch.stale_since is not None:
            return Reading(stale=True)
        try:
            busy, demand, missing_experts, placement = await asyncio.gather(
                self._registry.replica_load(),
                self._registry.expert_demand(),
                self._registry.missing_experts(),
                self._registry.placement(),
            )
        except RegistryUnreachable:
            return Reading(stale=True)
        older = self._older(demand)
        rows, activations = rates(older, demand), rates(older, demand, "activations")
        return Reading(
            False, self._watch.replicas, busy, rows, activations, latest_costs(demand), missing_experts, placement
        )

    def _older(self, newest: Mapping[str, ExpertDemand]) -> Mapping[str, ExpertDemand]:
        """The reading at the beginning of the window that `newest` ends."""
        now = time.monotonic()
        self._history.append((now, newest))
        while len(self._history) > 1 and self._history[1][0] <= now - WINDOW_S:
            self._history.popleft()
        return self._history[0][1]
