"""Reads the registry for the autoscaler: one snapshot per deployment, marked stale while the registry is not to be trusted."""

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
from moiety.core.replica import Placement, Replica, ReplicaState, Role, ready_experts
from moiety.errors import RegistryUnreachable
from moiety.policy.autoscale import Snapshot
from moiety.registry.interface import Registry
from moiety.registry.rates import WINDOW_S, latest_costs, main_costs, rates
from moiety.registry.watch import Watch
from moiety.scaling.expert_load import cost_model_of

Rates = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reading:
    """The registry's contents at one moment."""

    stale: bool
    replicas: tuple[Replica, ...] = ()
    busy: Mapping[str, ReplicaLoad] = field(default_factory=dict)
    rows_per_s: Rates = field(default_factory=lambda: np.zeros((0, 0)))  # [moe_layers][experts]
    activations_per_s: Rates = field(default_factory=lambda: np.zeros((0, 0)))  # [moe_layers][experts]
    # kind of replica -> the cost of a batch, as fitted by the router with the most samples
    costs_by_kind: Mapping[str, BatchCost] = field(default_factory=dict)
    missing_experts: Mapping[int, frozenset[int]] = field(default_factory=dict)
    placement: Placement | None = None

    @property
    def costs(self) -> BatchCost | None:
        """The cost of a batch on the kind of replica that computes most, for plans over all deployments."""
        return main_costs(self.costs_by_kind)

    def snapshot(self, deployment: str, target: int, default: ExpertSet, *, spare: bool = False) -> Snapshot:
        """Returns what is known of `deployment`. A deployment outside the placement in force holds `default`.

        `spare`: the deployment is a hot set, so other deployments hold all its experts too.
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
            missing_experts=self._has_waiters(held, spare),
            stale=self.stale,
            fixed=self._fixed(self._costs_of(live), held, loads),
            spare=spare,
            busy_if_added=self._busy_of_another(self._costs_of(live), held) if spare else 0.0,
            start_s=max((replica.started - replica.launched for replica in live if replica.launched), default=0.0),
        )

    def scaling(self, deployment: str) -> Mapping[str, float] | None:
        """Returns the scaling settings that the deployment's youngest live replica reports; None if no replica is live."""
        live = self._live(deployment)
        return max(live, key=lambda replica: replica.started).scaling if live else None

    def _live(self, deployment: str) -> list[Replica]:
        ready = (deployment, ReplicaState.READY)
        return [replica for replica in self.replicas if (replica.deployment, replica.state) == ready]

    def _has_waiters(self, held: ExpertSet, spare: bool) -> bool:
        """Whether requests, or a starting router, wait for an expert of `held`.

        A router stays STARTING until every expert has a holder. It does not wait for hot sets (`spare`).
        """
        starting = any((one.role, one.state) == (Role.ROUTER, ReplicaState.STARTING) for one in self.replicas)
        if starting and not spare:
            return len(held) > 0
        return any(experts & held.layer(layer) for layer, experts in self.missing_experts.items())

    def _costs_of(self, live: Sequence[Replica]) -> BatchCost | None:
        """Returns the cost of a batch on replicas like `live`; if there are none, or their kind has no fit, as `costs`."""
        youngest = max(live, key=lambda replica: replica.started, default=None)
        return self.costs_by_kind.get(youngest.kind, self.costs) if youngest else self.costs

    def _fixed(self, costs: BatchCost | None, held: ExpertSet, loads: Sequence[ReplicaLoad]) -> float:
        """Returns the fraction of a replica's busy time that does not shrink if more replicas share the rows of `held`."""
        batches, rows = sum(load.calls_per_s for load in loads), sum(load.rows_per_s for load in loads)
        if costs is None or not batches:
            return 0.0
        weights = costs.expert_bytes * _total(self.activations_per_s, held)
        return cost_model_of(costs).fixed_share(weights / batches, rows / batches)

    def _busy_of_another(self, costs: BatchCost | None, held: ExpertSet) -> float:
        """Predicts the busy fraction of one more replica that holds `held` and shares its rows with the present holders."""
        if costs is None:
            return 0.0
        replicas = ready_experts(self.replicas)
        busy = 0.0
        for layer, ids in held.by_layer.items():
            in_layer = ExpertSet({layer: ids})
            holders = sum(len(replica.held.layer(layer) & ids) for replica in replicas) / len(ids)
            activations = _total(self.activations_per_s, in_layer)
            batches = max(
                (_total(self.activations_per_s, ExpertSet({layer: frozenset({e})})) for e in ids), default=0.0
            )
            weights, rows = costs.expert_bytes * activations, _total(self.rows_per_s, in_layer)
            busy += cost_model_of(costs).busy(batches, weights, rows) / (holders + 1)
        return busy


def _total(per_s: Rates, held: ExpertSet) -> float:
    """Returns the sum of the rates `per_s` [layers, experts] of the experts `held`. Ids outside this shape count 0."""
    layers, experts = per_s.shape
    return sum(
        float(per_s[layer, [expert for expert in ids if expert < experts]].sum())
        for layer, ids in held.by_layer.items()
        if layer < layers
    )


class Ledger:
    """Reads one system's registry for the autoscaler, and keeps the routers' counters of the last WINDOW_S.

    Rows per second are the difference of two readings of these counters.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._watch = Watch(registry)
        self._history: deque[tuple[float, Mapping[str, ExpertDemand]]] = deque()

    async def read(self) -> Reading:
        """Reads the registry; the reading is `stale` if the registry does not answer or refuses writes.

        Never raises for an outage. While writes are refused, nobody can report load, so what is read is old.
        """
        await self._watch.poll()
        if self._watch.stale_since is not None:
            return Reading(stale=True)
        try:
            await self._registry.check_writes()
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
        """Keeps the counters `newest` and returns those that were read WINDOW_S before, or the oldest since the start."""
        now = time.monotonic()
        self._history.append((now, newest))
        while len(self._history) > 1 and self._history[1][0] <= now - WINDOW_S:
            self._history.popleft()
        return self._history[0][1]
