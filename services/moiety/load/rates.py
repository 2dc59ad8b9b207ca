"""From two readings of the load ledger to rows per second: a pure function of the readings' own times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from moiety.core import Costs, Demand

Counter = Literal["rows", "activations"]


def rates(
    older: Mapping[str, Demand], newer: Mapping[str, Demand], counter: Counter = "rows"
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


def latest_costs(demand: Mapping[str, Demand]) -> Costs | None:
    """The fit that has seen the most batches; None while there is none."""
    fits = [each.costs for each in demand.values() if each.costs is not None]
    return max(fits, key=lambda costs: costs.samples, default=None)


def _table(demand: Demand, counter: Counter) -> npt.NDArray[np.int64]:
    return np.asarray(getattr(demand, counter), dtype=np.int64)


def _added(before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    restarted = before.shape != after.shape or bool((after < before).any())
    return after if restarted else after - before
