"""Elastic groups with hot sets: Moiety."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moiety.config.application import GroupSettings
from moiety.policy.autoscale import Decision
from moiety.policy.placement.planner import plan_placement
from moiety.simulate.flow import Flow, flow, work
from moiety.simulate.scenario import Floats
from moiety.simulate.systems.replica_pool import SETTINGS, ReplicaPool
from moiety.simulate.systems.result import SAMPLED, Recorder, SystemResult
from moiety.simulate.systems.trace_load import (
    REPLAN_S,
    TraceLoad,
    default_deployments,
    default_placement,
    held_by,
    learned_cost,
    measured_load,
)

REPLAN_GAIN = 0.03  # of the critical path: less is not worth moving experts


def elastic(load: TraceLoad, settings: GroupSettings = SETTINGS, hot_sets: int | None = None) -> SystemResult:
    """Every group and hot set scaled by `policy.autoscale`, experts placed by `policy.placement`, costs by `policy.cost`.

    Each sees what was measured a time step ago. Replicas come `start_s` after they are asked for; experts move as fast as
    replicas read them, and serve from where they were until then.
    """
    cluster, trace = load.cluster, load.trace
    hot_sets = cluster.hot_sets if hot_sets is None else hot_sets
    rooms, placement = default_deployments(cluster, hot_sets), default_placement(cluster)
    costs = learned_cost(cluster, trace.seed)
    held = held_by(cluster, rooms, placement)
    first = work(cluster, load.included(0.0), held, np.ones(len(rooms)))
    needed = first.device_s * trace.rates[0] / cluster.batch / settings.target_busy
    pools = [
        ReplicaPool(
            room.deployment,
            settings if not room.hot else _spare(settings),
            0 if room.hot else int(np.ceil(count)),
            room.hot,
        )
        for room, count in zip(rooms, needed, strict=True)
    ]
    recorder, decisions = Recorder(trace), list[tuple[float, Decision]]()
    seen: Flow | None = None
    asked = first
    smooth: Floats | None = None
    stride = max(1, len(trace.rates) // (4 * SAMPLED))
    next_plan, coming, ready_at, rebalances, moved = 0.0, None, 0.0, 0, 0.0
    for index, rate in enumerate(trace.rates):
        now = index * trace.step_s
        if seen is not None:
            for deployment, pool in enumerate(pools):
                decision = pool.decide(now, cluster, trace, costs, asked, seen, deployment)
                if decision.changes:
                    decisions.append((now, decision))
        live = np.array([float(pool.live(now, cluster.start_s)) for pool in pools])
        included = load.included(now)
        if coming is not None and now >= ready_at:
            placement, held, coming = coming, held_by(cluster, rooms, coming), None
        asked = work(cluster, included, held, live)
        offered = rate + recorder.backlog / trace.step_s
        seen = flow(cluster, asked, live, offered, steps_too=index % stride == 0)
        recorder.add(seen, sum(pool.target for pool in pools), rate)
        hot = measured_load(cluster, costs, included, seen.served)
        smooth = hot if smooth is None else smooth + min(1.0, trace.step_s / 60) * (hot - smooth)
        if now >= next_plan and coming is None:
            next_plan = now + REPLAN_S
            sized = [replace(room, replicas=max(pool.target, 1)) for room, pool in zip(rooms, pools, strict=True)]
            planned = plan_placement(smooth, sized, placement, cluster.expert_bytes)
            if planned.changes and planned.gain > REPLAN_GAIN:
                most = max(map(len, planned.loads.values()), default=0) * cluster.expert_bytes
                coming, ready_at = planned.placement, now + most / cluster.read_bytes_per_s
                rebalances, moved = rebalances + 1, moved + planned.moved_bytes
    return recorder.outcome("elastic", decisions, rebalances, moved)


def _spare(settings: GroupSettings) -> GroupSettings:
    return settings.model_copy(update={"min_replicas": 0})
