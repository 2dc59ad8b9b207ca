"""The alternatives to the elastic system: a fixed size with and without EPLB, whole engines, and a clairvoyant bound."""

from __future__ import annotations

import numpy as np

from moiety.policy.autoscale import Snapshot
from moiety.simulate.flow import TimeStep, time_step, work_per_step
from moiety.simulate.systems.replica_pool import SETTINGS, ReplicaPool
from moiety.simulate.systems.result import SAMPLED, Recorder, SystemResult
from moiety.simulate.systems.trace_load import (
    TraceLoad,
    default_deployments,
    default_placement,
    held_by,
    with_redundancy,
)


def fixed(load: TraceLoad, per_group: float, redundancy: float = 0.0, name: str = "static EP") -> SystemResult:
    """Simulates `per_group` replicas of every group at all times: static expert parallelism, without or with EPLB.

    `redundancy`: fraction of memory added to each group for copies of experts. With redundancy, the planner stands in for
    EPLB: every REPLAN_S, it places experts and copies by the current load (only once if the trace has no drift). Moving
    them costs nothing.
    """
    cluster, trace = load.cluster, load.trace
    capacities = with_redundancy(cluster, redundancy)
    replicas = np.full(cluster.groups, float(per_group))
    placement = default_placement(cluster)
    held = held_by(cluster, capacities, placement)
    recorder = Recorder(trace)
    stride = max(1, len(trace.rates) // SAMPLED)
    for index in range(0, len(trace.rates), stride):
        now = index * trace.step_s
        included = load.included(now)
        if redundancy and (planned := load.copies(redundancy, now, placement)) is not placement:
            placement, held = planned, held_by(cluster, capacities, planned)
        rates = trace.rates[index : index + stride]
        step_work = work_per_step(cluster, included, held, replicas)
        seen = time_step(cluster, step_work, replicas, float(rates.mean()) + recorder.backlog / trace.step_s / stride)
        recorder.add(seen, float(replicas.sum()), float(rates.mean()), stride)
    return recorder.result(name)


def whole_engine(load: TraceLoad, target_busy: float) -> SystemResult:
    """Simulates whole engines, each with one replica of every group, which grow and shrink only as a whole.

    The elastic system's policy scales them by the busy fraction of the busiest group.
    """
    cluster, trace = load.cluster, load.trace
    settings = SETTINGS.model_copy(update={"target_busy": target_busy})
    held = held_by(cluster, default_deployments(cluster, 0), default_placement(cluster))
    one = np.ones(cluster.groups)
    step_work = work_per_step(cluster, load.included(0.0), held, one)
    engines = int(np.ceil(step_work.device_s.max() * trace.rates[0] / cluster.batch / target_busy))
    pool = ReplicaPool("engines", settings, max(engines, 1), False)
    recorder = Recorder(trace)
    stride = max(1, len(trace.rates) // SAMPLED)
    seen: TimeStep | None = None
    for index, rate in enumerate(trace.rates):
        now = index * trace.step_s
        if seen is not None:
            busy = float(seen.busy.max())
            pool.step(Snapshot("engines", pool.target, pool.last_live, pool.last_live, busy, 0.0, rate), now)
        live = pool.live(now, cluster.start_s)
        if index % stride == 0:
            step_work = work_per_step(cluster, load.included(now), held, one)
        offered = rate + recorder.backlog / trace.step_s
        seen = time_step(cluster, step_work, one * live, offered, steps_too=index % stride == 0)
        recorder.add(seen, pool.target * cluster.groups, rate)
    return recorder.result("whole engines")


def clairvoyant(load: TraceLoad, busy: float) -> SystemResult:
    """Simulates a lower bound: each group always has as many replicas (fractions too) as keep it at the fraction `busy`."""
    cluster, trace = load.cluster, load.trace
    held = held_by(cluster, default_deployments(cluster, 0), default_placement(cluster))
    recorder = Recorder(trace)
    stride = max(1, len(trace.rates) // SAMPLED)
    for index in range(0, len(trace.rates), stride):
        rate = float(trace.rates[index : index + stride].mean())
        step_work = work_per_step(cluster, load.included(index * trace.step_s), held, np.ones(cluster.groups))
        replicas = step_work.device_s * rate / cluster.batch / busy
        recorder.add(time_step(cluster, step_work, replicas, rate), float(replicas.sum()), rate, stride)
    return recorder.result("clairvoyant")
