"""The capacity of each expert deployment, for the placement planner: its replicas and how many experts fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moiety.config.application import HOT
from moiety.core.replica import Placement, Replica, ready_experts
from moiety.policy.placement.planner import DeploymentCapacity


def deployment_capacities(
    placement: Placement, replicas: Iterable[Replica], hot_memory: int, expert_bytes: int
) -> list[DeploymentCapacity]:
    """Returns one capacity per deployment of `placement`; only ready replicas count.

    Each group may hold as many experts per layer as the largest group holds now. A hot set may hold as many experts as fit
    into `hot_memory` bytes.
    """
    live = Counter(replica.deployment for replica in ready_experts(replicas))
    groups = [held for name, held in placement.held.items() if not name.startswith(HOT)]
    layers = max((layer + 1 for held in groups for layer in held.by_layer), default=0)
    slots = max((len(ids) for held in groups for ids in held.by_layer.values()), default=0)
    fits = hot_memory // max(expert_bytes, 1)
    return [
        DeploymentCapacity(name, fits if name.startswith(HOT) else layers * slots, live[name], name.startswith(HOT))
        for name in sorted(placement.held)
    ]
