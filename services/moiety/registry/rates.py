"""Computes rows per second from the cumulative counters in the load ledger. Time comes from the readings: no clock here."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from moiety.core.load import BatchCost, ExpertDemand

WINDOW_S = 3.0  # window of `RecentRates`; routers flush their counters every second
FLUSHES_KEPT = 8  # per writer: those of a window, and a few more

Counter = Literal["rows", "activations"]


def rates(
    older: Mapping[str, ExpertDemand], newer: Mapping[str, ExpertDemand], counter: Counter = "rows"
) -> npt.NDArray[np.float64]:
    """Returns rows (or activations) per second, [moe_layers][experts], summed over the routers in `newer`.

    `older` and `newer` are two readings of the load ledger: router's replica id -> cumulative counters. Of a router in
    both, the rows between the two readings count. If the router's counters went down, it restarted under the same id, and
    all rows in `newer` count. Of a router that only `newer` has, all rows count if the router `started` no earlier than
    the latest time in `older`. Otherwise (the store was emptied, or the router was silent for a while) its counters
    include rows from before `older`, and none of its rows count.

    The result has the shape of the counters with the latest time. A router whose counters have another shape serves
    another model and is left out. The shape is [0, 0] if `newer` is empty.
    """
    if not newer:
        return np.zeros((0, 0))
    newest = max(newer.values(), key=lambda demand: demand.time)
    shape = _table(newest, counter).shape
    total = np.zeros(shape)
    window_began = max((demand.time for demand in older.values()), default=newest.time)
    for writer, demand in newer.items():
        rows = _table(demand, counter)
        if rows.shape != shape:
            continue
        if (before := older.get(writer)) is not None:
            added, seconds = _added(_table(before, counter), rows), demand.time - before.time
        elif demand.started >= window_began:
            added, seconds = rows, demand.time - window_began
        else:
            continue
        if seconds > 0:
            total += added / seconds
    return total


class RecentRates:
    """Computes one router's rows per second over about the last WINDOW_S, from the counters that the router reports."""

    def __init__(self) -> None:
        self._flushes: deque[tuple[float, npt.NDArray[np.int64]]] = deque(maxlen=FLUSHES_KEPT)

    def rows_per_s(self, demand: ExpertDemand) -> npt.NDArray[np.float64]:
        """Adds the router's next counters; returns rows per second, [moe_layers][experts]. The first call returns zeros."""
        rows = _table(demand, "rows")
        if self._flushes and demand.time < self._flushes[-1][0]:
            self._flushes.clear()  # the clock was set back
        if not self._flushes or demand.time > self._flushes[-1][0]:
            self._flushes.append((demand.time, rows))
        while len(self._flushes) > 1 and self._flushes[1][0] <= demand.time - WINDOW_S:
            self._flushes.popleft()
        began, before = self._flushes[0]
        seconds = demand.time - began
        return _added(before, rows) / seconds if seconds > 0 else np.zeros(rows.shape)


def hottest(rows_per_s: npt.NDArray[np.float64], count: int) -> dict[str, float]:
    """Returns `layer/expert` -> rows per second for the `count` busiest experts; `rows_per_s` is [layers, experts]."""
    flat, experts = rows_per_s.reshape(-1), rows_per_s.shape[1]
    top = np.argsort(-flat, kind="stable")[:count]
    return {f"{cell // experts}/{cell % experts}": round(float(flat[cell]), 1) for cell in top if flat[cell] > 0}


def latest_costs(demand: Mapping[str, ExpertDemand]) -> Mapping[str, BatchCost]:
    """Returns, for each kind of replica, the batch-cost fit with the most samples among all routers' fits."""
    fits = sorted((costs for reading in demand.values() for costs in reading.costs), key=lambda costs: costs.samples)
    return {costs.kind: costs for costs in fits}


def main_costs(by_kind: Mapping[str, BatchCost]) -> BatchCost | None:
    """Returns the costs of the kind with the most samples, for what concerns all replicas; None if no router has a fit yet."""
    return max(by_kind.values(), key=lambda costs: costs.samples, default=None)


def _table(demand: ExpertDemand, counter: Counter) -> npt.NDArray[np.int64]:
    return np.asarray(getattr(demand, counter), dtype=np.int64)


def _added(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    restarted = before.shape != after.shape or bool((after < before).any())
    return after if restarted else after - before
