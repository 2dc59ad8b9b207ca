"""The deployments of experts as the placement planner sees them: how many replicas share a load, and what fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moiety.config.application import HOT
from moiety.core.replica import Placement, Replica, ReplicaState, Role
from moiety.policy.placement.planner import DeploymentCapacity


def deployment_capacities(
    placement: Placement, replicas: Iterable[Replica], hot_memory: int, expert_bytes: int
) -> list[DeploymentCapacity]:
    """One room per deployment of `placement`, of the replicas that are ready.

    Groups get no more memory than the largest of them has now; a hot set takes as many experts as fit in `hot_memory`.
    """
    live = Counter(
        each.deployment for each in replicas if each.role is Role.EXPERT and each.state is ReplicaState.READY
    )
    groups = [held for name, held in placement.held.items() if not name.startswith(HOT)]
    layers = max((layer + 1 for held in groups for layer in held.by_layer), default=0)
    slots = max((len(ids) for held in groups for ids in held.by_layer.values()), default=0)
    fits = hot_memory // max(expert_bytes, 1)
    return [
        DeploymentCapacity(name, fits if name.startswith(HOT) else layers * slots, live[name], name.startswith(HOT))
        for name in sorted(placement.held)
    ]
