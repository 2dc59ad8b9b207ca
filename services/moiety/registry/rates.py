"""From two readings of the load ledger to rows per second: a pure function of the readings' own times."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from moiety.core.load import BatchCost, ExpertDemand

WINDOW_S = 3.0  # that rates are over: routers flush their counters every second
FLUSHES_KEPT = 8  # of one writer: a window's, and some to spare

Counter = Literal["rows", "activations"]


def rates(
    older: Mapping[str, ExpertDemand], newer: Mapping[str, ExpertDemand], counter: Counter = "rows"
) -> npt.NDArray[np.float64]:
    """Rows (or activations) per second, [moe_layers][experts], summed over the writers of `newer`.

    A writer counts with what it added between its two readings. One whose counters went down has started again under
    its id, and counts whole. One that `older` lacks counts whole if it `started` within the window, that is, after the
    latest time in `older`; otherwise (a store that was emptied, a writer that was silent for a while) its count is
    older than the window, and it counts from the next one on.

    The shape is the newest reading's; writers of another shape serve another model and are left out. [0, 0] if there
    are no readings.
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


class Recent:
    """One writer's rows per second over the last WINDOW_S, as the writer itself knows them."""

    def __init__(self) -> None:
        self._flushes: deque[tuple[float, npt.NDArray[np.int64]]] = deque(maxlen=FLUSHES_KEPT)

    def rows_per_s(self, demand: ExpertDemand) -> npt.NDArray[np.float64]:
        """[moe_layers][experts] at the time of `demand`, the writer's next flush; 0 at its first, which ends no window."""
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


def latest_costs(demand: Mapping[str, ExpertDemand]) -> BatchCost | None:
    """The fit that has seen the most batches; None while there is none."""
    fits = [each.costs for each in demand.values() if each.costs is not None]
    return max(fits, key=lambda costs: costs.samples, default=None)


def _table(demand: ExpertDemand, counter: Counter) -> npt.NDArray[np.int64]:
    return np.asarray(getattr(demand, counter), dtype=np.int64)


def _added(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    restarted = before.shape != after.shape or bool((after < before).any())
    return after if restarted else after - before
