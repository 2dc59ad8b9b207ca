"""Places experts anew, while they serve, when that is worth it: proposes, has the planner compare, and sets the placement."""

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

EVERY_S = 5.0  # between two looks at whether another placement would be better
_log = logging.getLogger("ray.serve")


class Rebalancer:
    """Keeps one system's placement in force, and good.

    A store that was emptied gets the last placement again. While a change is under way, nothing is planned.
    """

    def __init__(self, registry: Registry, gain: float | None, hot_memory: int, layers: int = 0) -> None:
        """`gain`: that is worth a change; None = what is set stays. `hot_memory`: bytes for the experts of a hot set.
        `layers`: MoE layers to change at a time; 0 = all.
        """
        self._registry, self._gain, self._hot_memory, self._layers = registry, gain, hot_memory, layers
        self._stages: deque[Placement] = deque()  # of the change under way, still to be set
        self._last: Placement | None = None
        self._heat = ExpertLoad()
        self._next = 0.0

    async def follow(self, reading: Reading, default: Mapping[str, ExpertSet] | None, now: float) -> None:
        """To be called after each reading; `now` in seconds. `default` is set where there was never a placement."""
        if reading.stale:
            return
        if reading.placement is None:
            if self._last is not None or default is not None:
                await self._restore(reading, self._last or Placement(1, default or {}))
            return
        self._last = reading.placement
        if self._gain is None or reading.costs is None:
            return
        self._heat.observe(reading.rows_per_s, reading.activations_per_s, reading.costs, now)
        if unsettled(reading.replicas, reading.placement.epoch):
            return
        if self._stages:
            await self._next_stage()
            return
        if now < self._next or not self._heat.table.any():
            return
        self._next = now + EVERY_S
        rooms = deployment_capacities(reading.placement, reading.replicas, self._hot_memory, reading.costs.expert_bytes)
        found = await asyncio.to_thread(
            plan_placement, self._heat.table, rooms, reading.placement, reading.costs.expert_bytes
        )
        if not found.changes or found.gain < self._gain:
            return
        self._stages.extend(placement_stages(reading.placement, found.placement, self._layers))
        if await self._next_stage():
            _log.info("placement %d: %s", found.placement.epoch, "; ".join(found.lines()))
            await self._registry.record_decision(decision_of(found, f"{found.gain:.0%} gain ≥ {self._gain:.0%}"))

    async def _next_stage(self) -> bool:
        """Sets it; where somebody else has set a placement meanwhile, the rest of the change is given up."""
        if await self._registry.set_placement(self._stages.popleft()):
            return True
        self._stages.clear()
        return False

    async def _restore(self, reading: Reading, last: Placement) -> None:
        """Replicas follow higher epochs only, so what they hold already is no news to them."""
        epoch = max((replica.placement_epoch for replica in reading.replicas), default=0)
        restored = Placement(max(epoch, last.epoch), last.held)
        if await self._registry.set_placement(restored):
            _log.info("placement %d is set%s", restored.epoch, " again" if epoch else "")


def decision_of(found: PlacementPlan, why: str) -> dict[str, Any]:
    """A change of placement as the log of decisions tells it."""
    epoch = found.placement.epoch
    return {
        "time": time.time(),
        "deployment": "placement",
        "from": epoch - 1,
        "to": epoch,
        "reason": f"{why}: {sum(map(len, found.loads.values()))} experts move",
        "inputs": {"before": found.before, "after": found.after, "balancedness": found.balancedness},
    }
