"""Simulates Moiety: elastic groups with hot sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moiety.config.options import Scaling
from moiety.policy.autoscale import Decision
from moiety.policy.placement.planner import plan_placement
from moiety.simulate.flow import TimeStep, time_step, work_per_step
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

REPLAN_GAIN = 0.03  # fraction of the critical path that a new placement must save


def elastic(load: TraceLoad, settings: Scaling = SETTINGS, hot_sets: int | None = None) -> SystemResult:
    """Simulates groups and hot sets that `policy/autoscale.py` scales and `policy/placement/planner.py` fills with experts.

    Both use the costs that a router has fitted by `policy/cost_model.py`. Scaling sees the measurements of the previous time
    step. Replicas serve `start_s` after the decision. A new placement serves once its experts are loaded; until then, the
    old one does.
    """
    cluster, trace = load.cluster, load.trace
    hot_sets = cluster.hot_sets if hot_sets is None else hot_sets
    capacities, placement = default_deployments(cluster, hot_sets), default_placement(cluster)
    costs = learned_cost(cluster, trace.seed)
    held = held_by(cluster, capacities, placement)
    first = work_per_step(cluster, load.included(0.0), held, np.ones(len(capacities)))
    needed = first.device_s * trace.rates[0] / cluster.batch / settings.target_busy
    pools = [
        ReplicaPool(
            capacity.deployment,
            settings if not capacity.hot else _spare(settings),
            0 if capacity.hot else int(np.ceil(count)),
            capacity.hot,
        )
        for capacity, count in zip(capacities, needed, strict=True)
    ]
    recorder, decisions = Recorder(trace), list[tuple[float, Decision]]()
    seen: TimeStep | None = None
    step_work = first
    smooth: Floats | None = None
    stride = max(1, len(trace.rates) // (4 * SAMPLED))
    next_plan, coming, ready_at, rebalances, moved = 0.0, None, 0.0, 0, 0.0
    for index, rate in enumerate(trace.rates):
        now = index * trace.step_s
        if seen is not None:
            for deployment, pool in enumerate(pools):
                decision = pool.decide(now, cluster, costs, step_work, seen, deployment)
                if decision.changes:
                    decisions.append((now, decision))
        live = np.array([float(pool.live(now, cluster.start_s)) for pool in pools])
        included = load.included(now)
        if coming is not None and now >= ready_at:
            placement, held, coming = coming, held_by(cluster, capacities, coming), None
        step_work = work_per_step(cluster, included, held, live)
        offered = rate + recorder.backlog / trace.step_s
        seen = time_step(cluster, step_work, live, offered, steps_too=index % stride == 0)
        recorder.add(seen, sum(pool.target for pool in pools), rate)
        latest = measured_load(cluster, costs, included, seen.served)
        smooth = latest if smooth is None else smooth + min(1.0, trace.step_s / 60) * (latest - smooth)
        if now >= next_plan and coming is None:
            next_plan = now + REPLAN_S
            sized = [
                replace(capacity, replicas=max(pool.target, 1))
                for capacity, pool in zip(capacities, pools, strict=True)
            ]
            planned = plan_placement(smooth, sized, placement, cluster.expert_bytes)
            if planned.changes and planned.gain > REPLAN_GAIN:
                most = max(map(len, planned.loads.values()), default=0) * cluster.expert_bytes
                coming, ready_at = planned.placement, now + most / cluster.read_bytes_per_s
                rebalances, moved = rebalances + 1, moved + planned.moved_bytes
    return recorder.result("elastic", decisions, rebalances, moved)


def _spare(settings: Scaling) -> Scaling:
    return settings.model_copy(update={"min_replicas": 0})
