"""Sizes a system: the smallest size that meets a latency, and the throughput of a given size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moiety.policy.placement.planner import plan_placement
from moiety.simulate.flow import time_step, work_per_step
from moiety.simulate.scenario import Cluster, Floats
from moiety.simulate.systems.result import SystemResult
from moiety.simulate.systems.trace_load import default_deployments, default_placement, held_by, measured_load


def smallest(run: Callable[[float], SystemResult], sizes: Sequence[float], p99_ms: float) -> SystemResult:
    """Returns the result of `run` for the smallest of the ascending `sizes` that meets `p99_ms`, found by bisection.

    If no size meets it, returns the result of the largest.
    """
    low, high = 0, len(sizes) - 1
    best = run(sizes[high])
    while low < high:
        middle = (low + high) // 2
        outcome = run(sizes[middle])
        if outcome.p99_ms <= p99_ms:
            best, high = outcome, middle
        else:
            low = middle + 1
    return best


def throughput(cluster: Cluster, included: Floats, p99_ms: float, replicas: int, hot_replicas: int = 0) -> float:
    """Returns the tokens per second that `replicas`, sized and placed for this load, serve with steps within `p99_ms`.

    `hot_replicas` of them belong to hot sets. Groups get replicas in proportion to their work.
    """
    hot = cluster.hot_sets if hot_replicas else 0
    capacities, placement = default_deployments(cluster, hot), default_placement(cluster)
    sizes = np.full(len(capacities), (replicas - hot_replicas) / cluster.groups)
    sizes[cluster.groups :] = hot_replicas / max(hot, 1)
    held = held_by(cluster, capacities, placement)
    for _ in range(4):  # placement and sizes depend on each other: iterate
        if hot:
            sized = [
                replace(capacity, replicas=max(1, round(size)))
                for capacity, size in zip(capacities, sizes, strict=True)
            ]
            measured = measured_load(cluster, cluster.cost, included, 1.0)
            held = held_by(cluster, capacities, plan_placement(measured, sized, placement).placement)
        step_work = work_per_step(cluster, included, held, sizes)
        sizes = replicas * step_work.device_s / step_work.device_s.sum()
    step_work = work_per_step(cluster, included, held, sizes)
    low, high = 0.0, replicas * cluster.batch / float(step_work.device_s.sum())
    for _ in range(30):
        rate = (low + high) / 2
        seen = time_step(cluster, step_work, sizes, rate)
        good = 1000 * (seen.step_s + 2.3263 * seen.step_sd_s) <= p99_ms and seen.served >= rate
        low, high = (rate, high) if good else (low, rate)
    return low
