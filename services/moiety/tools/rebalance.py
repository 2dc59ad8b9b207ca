"""Plans a placement for a running system from its load ledger, and puts it in force while requests run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

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
class Ask:
    """What to plan for."""

    watch_s: float = 2 * WINDOW_S  # how long the load is looked at
    hot_sets: int | None = None  # None = those that there are
    hot_memory: int = 1 << 30  # bytes for the experts of each


async def proposed(registry: Registry, ask: Ask) -> PlacementPlan:
    """A plan for the load of the next `ask.watch_s` seconds, compared with what is in force.

    Raises RegistryUnreachable, and FailedPrecondition where there are no experts or no load to plan for.
    """
    await registry.replicas()  # a wrong address is told at once, not after `watch_s`
    ledger, heat, until = Ledger(registry), ExpertLoad(), time.monotonic() + ask.watch_s
    while True:
        reading = await ledger.read()
        if reading.costs is not None and reading.rows_per_s.any():
            heat.observe(reading.rows_per_s, reading.activations_per_s, reading.costs, time.monotonic())
        if time.monotonic() >= until:
            break
        await asyncio.sleep(POLL_S)
    if reading.costs is None or not heat.table.any():
        raise FailedPrecondition(f"no expert had a row in {ask.watch_s:g} s: there is no load to plan for")
    current = _in_force(reading, ask.hot_sets)
    bytes_each = reading.costs.expert_bytes
    rooms = deployment_capacities(current, reading.replicas, ask.hot_memory, bytes_each)
    return await asyncio.to_thread(plan_placement, heat.table, rooms, current, bytes_each)


async def enact(
    registry: Registry, found: PlacementPlan, timeout_s: float, tell: Callable[[str], None], layers: int = 0
) -> None:
    """Puts a plan in force; returns once every replica has loaded what is new to it and dropped what is not its own.

    `layers`: MoE layers to change at a time; 0 = all. Raises FailedPrecondition where another placement came first,
    Unavailable where replicas have not followed a stage within `timeout_s`: it stays in force, and they go on.
    """
    began, current = time.monotonic(), await registry.placement()
    steps = placement_stages(current, found.placement, layers) if current is not None else (found.placement,)
    if current is not None and current.epoch + 1 != found.placement.epoch:
        raise FailedPrecondition(f"placement {current.epoch} was set by somebody else meanwhile: plan again")
    for number, step in enumerate(steps, 1):
        if not await registry.set_placement(step):
            raise FailedPrecondition(f"placement {step.epoch} was set by somebody else meanwhile: plan again")
        if number == 1:
            await registry.record_decision(decision_of(found, "moiety rebalance"))
        tell(
            f"placement {step.epoch} is set ({number} of {len(steps)}): replicas load, routers acknowledge, replicas drop"
        )
        await until_settled(registry, step.epoch, timeout_s)
    tell(f"placement {steps[-1].epoch} is in force everywhere after {time.monotonic() - began:.1f} s")


def _in_force(reading: Reading, hot_sets: int | None) -> Placement:
    """The placement in force or, where none was ever set, what replicas hold; with the hot sets that are asked for."""
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
