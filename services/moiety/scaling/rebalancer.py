"""Changes the placement of experts in a running system if a new plan gains enough. Restores a placement that was lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement, Replica, Role
from moiety.policy.placement.planner import PlacementPlan, plan_placement
from moiety.policy.placement.stages import placement_stages
from moiety.registry.interface import Registry
from moiety.scaling.deployment_capacity import deployment_capacities
from moiety.scaling.expert_load import ExpertLoad
from moiety.scaling.ledger import Reading
from moiety.scaling.placement_progress import unsettled

EVERY_S = 5.0  # between two checks whether another placement would be better
_log = logging.getLogger("ray.serve")


class Rebalancer:
    """Adapts one system's placement to the load of its experts, and sets it again if the registry's store was emptied.

    While replicas still follow a change of placement, it plans no other.
    """

    def __init__(self, registry: Registry, gain: float | None, hot_memory: int, layers: int = 0) -> None:
        """`gain`: the least gain that justifies a change; None = never change. `hot_memory`: bytes for a hot set's experts.
        `layers`: MoE layers to change at a time; 0 = all.
        """
        self._registry, self._gain, self._hot_memory, self._layers = registry, gain, hot_memory, layers
        self._stages: deque[Placement] = deque()  # stages of the current change that are not set yet
        self._last: Placement | None = None
        self._expert_load = ExpertLoad()
        self._next = 0.0

    async def follow(self, reading: Reading, default: Mapping[str, ExpertSet] | None, now: float) -> None:
        """Restores the placement, sets its next stage or plans a new one, as a `reading` of the registry requires.

        If no reading has had a placement, sets `default`, the experts of each deployment. Call it after each reading. `now`
        is in seconds.
        """
        if reading.stale:
            return
        if reading.placement is None:
            if self._last is not None or default is not None:
                await self._restore(reading, self._last or Placement(1, default or {}))
            return
        self._last = reading.placement
        if self._gain is None or reading.costs is None:
            return
        self._expert_load.observe(reading.rows_per_s, reading.activations_per_s, reading.costs, now)
        if unsettled(reading.replicas, reading.placement.epoch):
            return
        if self._stages:
            await self._next_stage()
            return
        if now < self._next or not self._expert_load.table.any():
            return
        self._next = now + EVERY_S
        expert_bytes = reading.costs.expert_bytes
        capacities = deployment_capacities(reading.placement, reading.replicas, self._hot_memory, expert_bytes)
        plan = await asyncio.to_thread(
            plan_placement, self._expert_load.table, capacities, reading.placement, expert_bytes
        )
        if not plan.changes or plan.gain < self._gain:
            return
        self._stages.extend(placement_stages(reading.placement, plan.placement, self._layers))
        if await self._next_stage():
            _log.info("placement %d: %s", plan.placement.epoch, "; ".join(plan.lines()))
            await self._registry.record_decision(decision_of(plan, f"{plan.gain:.0%} gain ≥ {self._gain:.0%}"))

    async def _next_stage(self) -> bool:
        """Sets the change's next stage. If another process has set a placement, drops all other stages and returns False."""
        if await self._registry.set_placement(self._stages.popleft()):
            return True
        self._stages.clear()
        return False

    async def _restore(self, reading: Reading, last: Placement) -> None:
        """Sets the placement that was lost: `last`, the newest one that this process has read, or the one that replicas follow.

        Replicas follow only placements with a higher epoch than theirs, so those that hold it already change nothing. Sets none
        while no service is live: an ended system must leave nothing (`reading` may still have its replicas).
        """
        if not await self._registry.replicas():
            return
        lost = _followed(reading.replicas, last)
        if await self._registry.set_placement(lost):
            _log.info("placement %d is set", lost.epoch)


def _followed(replicas: Sequence[Replica], last: Placement) -> Placement:
    """Returns the placement to restore where `last` was the newest one read. Another process may have set a newer one since.

    What replicas hold under a newer epoch is the placement of that epoch, if together they hold all experts. If they do not,
    some have yet to follow it. Then the experts of `last` get an epoch above all, so that all replicas return to it.
    """
    epoch = max((replica.placement_epoch for replica in replicas), default=0)
    if epoch <= last.epoch:
        return last
    newer = {one.deployment: one.held for one in replicas if one.role is Role.EXPERT and one.placement_epoch == epoch}
    lacking = reduce(or_, last.held.values(), ExpertSet()) - reduce(or_, newer.values(), ExpertSet())
    return Placement(epoch + 1, last.held) if len(lacking) else Placement(epoch, {**last.held, **newer})


def decision_of(plan: PlacementPlan, why: str) -> dict[str, Any]:
    """Returns the entry that the log of decisions gets for a change of placement."""
    epoch = plan.placement.epoch
    return {
        "time": time.time(),
        "deployment": "placement",
        "from": epoch - 1,
        "to": epoch,
        "reason": f"{why}: {sum(map(len, plan.loads.values()))} experts move",
        "inputs": {"before": plan.before, "after": plan.after, "balancedness": plan.balancedness},
    }
