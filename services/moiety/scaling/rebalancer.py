"""Changes the placement of experts while they serve, when a new plan gains enough, and keeps a placement in force."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement
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
    """Keeps one system's placement in force and balanced.

    If the store was emptied, it sets the last placement again. While a change is under way, it plans nothing.
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
        """Acts on one reading; `now` in seconds. Sets `default` if there was never a placement. Call it after each reading."""
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
        """Sets the next stage. If another process has set a placement meanwhile, drops the rest and returns False."""
        if await self._registry.set_placement(self._stages.popleft()):
            return True
        self._stages.clear()
        return False

    async def _restore(self, reading: Reading, last: Placement) -> None:
        """Sets `last` again, with the replicas' highest epoch: they follow only higher ones, so they change nothing."""
        epoch = max((replica.placement_epoch for replica in reading.replicas), default=0)
        restored = Placement(max(epoch, last.epoch), last.held)
        if await self._registry.set_placement(restored):
            _log.info("placement %d is set%s", restored.epoch, " again" if epoch else "")


def decision_of(plan: PlacementPlan, why: str) -> dict[str, Any]:
    """Returns the entry of a change of placement for the log of decisions."""
    epoch = plan.placement.epoch
    return {
        "time": time.time(),
        "deployment": "placement",
        "from": epoch - 1,
        "to": epoch,
        "reason": f"{why}: {sum(map(len, plan.loads.values()))} experts move",
        "inputs": {"before": plan.before, "after": plan.after, "balancedness": plan.balancedness},
    }
