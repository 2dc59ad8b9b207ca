"""The load that a trace puts on a cluster, and the default and planned placements of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement
from moiety.policy.cost_model import KernelCost, Sample, expert_load, update
from moiety.policy.placement.planner import DeploymentCapacity, held_table, plan_placement
from moiety.simulate.flow import HeldExperts
from moiety.simulate.scenario import Cluster, Floats, Trace, inclusion, popularity

LOOK_S = 120.0  # how often popularity is sampled from the trace: topics drift over hours


REPLAN_S = 900.0


@dataclass(slots=True)
class TraceLoad:
    """Computes inclusion probabilities and EPLB's placements for a trace on a cluster, and keeps them for later calls."""

    cluster: Cluster
    trace: Trace
    _included: dict[int, Floats] = field(default_factory=dict)
    _copies: dict[tuple[float, int], Placement] = field(default_factory=dict)

    def included(self, time_s: float) -> Floats:
        """Returns the inclusion probabilities [L, E] at `time_s`."""
        look = int(time_s // LOOK_S) if self.trace.drift else 0
        if look not in self._included:
            popular = popularity(self.trace, self.cluster, look * LOOK_S)
            self._included[look] = inclusion(popular, self.cluster.top_k)
        return self._included[look]

    def copies(self, redundancy: float, time_s: float, before: Placement) -> Placement:
        """Returns the placement that EPLB makes at `time_s` if groups have memory for a fraction `redundancy` more experts.

        The placement does not depend on the number of devices per group.
        """
        look = int(time_s // REPLAN_S) if self.trace.drift else 0
        if (redundancy, look) not in self._copies:
            measured = measured_load(
                self.cluster, learned_cost(self.cluster, self.trace.seed), self.included(time_s), 1.0
            )
            capacities = with_redundancy(self.cluster, redundancy)
            self._copies[redundancy, look] = plan_placement(measured, capacities, before).placement
        return self._copies[redundancy, look]


def default_deployments(cluster: Cluster, hot_sets: int) -> list[DeploymentCapacity]:
    """Returns the cluster's groups, and hot sets with the same memory."""
    groups = [DeploymentCapacity(f"experts-{index}", cluster.experts_per_replica) for index in range(cluster.groups)]
    return groups + [
        DeploymentCapacity(f"hot-{index}", cluster.experts_per_replica, hot=True) for index in range(hot_sets)
    ]


def default_placement(cluster: Cluster) -> Placement:
    """Returns the default placement, like `ModelShape.partition`: contiguous experts in each group, none in hot sets."""
    even = np.ones((cluster.layers, cluster.experts))
    held = np.arange(cluster.experts) * cluster.groups // cluster.experts
    start = {
        f"experts-{group}": ExpertSet.uniform(cluster.layers, np.flatnonzero(held == group).tolist())
        for group in range(cluster.groups)
    }
    return plan_placement(even, default_deployments(cluster, 0), Placement(0, start)).placement


def held_by(cluster: Cluster, capacities: Sequence[DeploymentCapacity], placement: Placement) -> HeldExperts:
    """Returns what each of `capacities` holds by `placement`, in the form that `flow.py` reads."""
    return HeldExperts.of(held_table(capacities, placement, cluster.layers, cluster.experts))


def with_redundancy(cluster: Cluster, redundancy: float) -> list[DeploymentCapacity]:
    """Returns the cluster's groups, each with memory for a fraction `redundancy` more experts."""
    extra = round(cluster.layers * cluster.experts / cluster.groups * redundancy)
    return [replace(capacity, experts=capacity.experts + extra) for capacity in default_deployments(cluster, 0)]


def learned_cost(cluster: Cluster, seed: int) -> KernelCost:
    """Returns the cost model that a router has fitted after 500 replies with 10 % noise."""
    random = np.random.default_rng(seed + 2)
    model = KernelCost()
    for _ in range(500):
        experts = random.integers(1, 2 * cluster.experts // cluster.groups)
        weights, rows = float(experts * cluster.expert_bytes), float(experts * random.integers(1, cluster.batch))
        took = cluster.cost.predict(weights, rows) * float(np.exp(0.1 * random.standard_normal()))
        model = update(model, Sample(weights, rows, took))
    return model


def measured_load(cluster: Cluster, costs: KernelCost, included: Floats, rate: float) -> Floats:
    """Returns [L, E]: device seconds per second at `rate` tokens per second, as a ledger would report them."""
    steps = rate / cluster.batch
    activated = 1 - (1 - included) ** cluster.batch
    return expert_load(costs, included * rate, activated * steps, cluster.expert_bytes)
