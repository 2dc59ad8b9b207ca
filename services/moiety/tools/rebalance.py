"""`moiety rebalance`: plans a placement for a running system from its load ledger, and applies it while requests run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moiety.config.application import HOT
from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement, Replica, Role
from moiety.errors import FailedPrecondition
from moiety.policy.placement.planner import PlacementPlan, plan_placement
from moiety.policy.placement.stages import placement_stages
from moiety.registry.interface import Registry
from moiety.registry.rates import WINDOW_S
from moiety.scaling.deployment_capacity import deployment_capacities
from moiety.scaling.expert_load import ExpertLoad
from moiety.scaling.ledger import Ledger, Reading
from moiety.scaling.placement_progress import until_settled
from moiety.scaling.rebalancer import decision_of

POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class RebalanceRequest:
    """How long to watch the load before planning, and what the plan may use for hot sets."""

    watch_s: float = 2 * WINDOW_S  # how long to watch the load
    hot_sets: int | None = None  # hot sets that the plan may fill; None = those that are deployed
    hot_memory: int = 1 << 30  # bytes for the experts of one hot set


async def propose_placement(registry: Registry, request: RebalanceRequest) -> PlacementPlan:
    """Watches the expert load for `request.watch_s` seconds, then returns a plan: a new placement for this load.

    The plan compares this placement with the one in force. Raises RegistryUnreachable, and FailedPrecondition where there
    is no expert replica or no load.
    """
    await registry.check_writes()  # so that a wrong address fails at once, not after `watch_s`
    ledger, expert_load, until = Ledger(registry), ExpertLoad(), time.monotonic() + request.watch_s
    while True:
        reading = await ledger.read()
        if reading.costs is not None and reading.rows_per_s.any():
            expert_load.observe(reading.rows_per_s, reading.activations_per_s, reading.costs, time.monotonic())
        if time.monotonic() >= until:
            break
        await asyncio.sleep(POLL_S)
    if reading.costs is None or not expert_load.table.any():
        raise FailedPrecondition(f"no expert had a row in {request.watch_s:g} s: there is no load to plan for")
    current = _in_force(reading, request.hot_sets)
    expert_bytes = reading.costs.expert_bytes
    capacities = deployment_capacities(current, reading.replicas, request.hot_memory, expert_bytes)
    return await asyncio.to_thread(plan_placement, expert_load.table, capacities, current, expert_bytes)


async def apply_placement(
    registry: Registry, plan: PlacementPlan, timeout_s: float, progress: Callable[[str], None], layers: int = 0
) -> None:
    """Puts a plan in force. Returns once every replica has loaded its new experts and dropped those it no longer has.

    Changes at most `layers` MoE layers in each stage; 0 = all in one stage. Raises FailedPrecondition where another process
    has set a placement since the plan was made. Raises Unavailable where replicas have not followed a stage within `timeout_s`;
    the placement of this stage then stays in force, and the replicas continue to follow it.
    """
    began, current = time.monotonic(), await registry.placement()
    steps = placement_stages(current, plan.placement, layers) if current is not None else (plan.placement,)
    if current is not None and current.epoch + 1 != plan.placement.epoch:
        raise FailedPrecondition(f"placement {current.epoch} was set by another process in the meantime: plan again")
    for number, step in enumerate(steps, 1):
        if not await registry.set_placement(step):
            raise FailedPrecondition(f"placement {step.epoch} was set by another process in the meantime: plan again")
        if number == 1:
            await registry.record_decision(decision_of(plan, "moiety rebalance"))
        progress(
            f"placement {step.epoch} is set ({number} of {len(steps)}): replicas load, routers acknowledge, replicas drop"
        )
        await until_settled(registry, step.epoch, timeout_s)
    progress(f"placement {steps[-1].epoch} is in force everywhere after {time.monotonic() - began:.1f} s")


def plan_json(plan: PlacementPlan, system: str, *, applied: bool) -> dict[str, Any]:
    """Returns a plan for `system` as JSON types. Loads are device seconds per second."""
    return {
        "system": system,
        "epoch": plan.placement.epoch,
        "applied": applied,
        "placement": {name: str(held) for name, held in plan.placement.held.items()},
        "loads": {name: str(experts) for name, experts in plan.loads.items()},
        "drops": {name: str(experts) for name, experts in plan.drops.items()},
        "moved_bytes": plan.moved_bytes,
        "critical_path_before": plan.before,
        "critical_path_after": plan.after,
        "gain": plan.gain,
        "balancedness": plan.balancedness,
    }


def _in_force(reading: Reading, hot_sets: int | None) -> Placement:
    """Returns the placement in force or, where none was ever set, the placement that replicas hold now.

    If `hot_sets` is given, adds those of the first `hot_sets` hot sets that are missing, without experts. Raises
    FailedPrecondition where there is no expert replica.
    """
    held = dict(reading.placement.held if reading.placement is not None else _held(reading.replicas))
    if not held:
        raise FailedPrecondition("the registry lists no expert replica")
    epochs = (replica.placement_epoch for replica in reading.replicas if replica.role is Role.EXPERT)
    epoch = reading.placement.epoch if reading.placement is not None else max(epochs, default=0)
    if hot_sets is not None:
        missing = {f"{HOT}{slot}": ExpertSet() for slot in range(hot_sets)}
        held = {**missing, **held}
    return Placement(epoch, held)


def _held(replicas: tuple[Replica, ...]) -> dict[str, ExpertSet]:
    return {replica.deployment: replica.held for replica in replicas if replica.role is Role.EXPERT}
