"""The device time that each expert needs, from the load ledger and smoothed. Placement is planned on it."""

from __future__ import annotations

from math import exp

import numpy as np
import numpy.typing as npt

from moiety.core.load import BatchCost
from moiety.policy.cost_model import KernelCost, expert_load

SMOOTHING_S = 10.0  # time constant: a burst of one second moves no weights, ten seconds of load do


def cost_model_of(costs: BatchCost) -> KernelCost:
    """Converts the batch costs that a router has reported to the policy's KernelCost."""
    return KernelCost(costs.fixed_s, costs.s_per_byte, costs.s_per_row, costs.samples)


class ExpertLoad:
    """Exponentially smoothed load of every (layer, expert)."""

    def __init__(self) -> None:
        self.table: npt.NDArray[np.float64] = np.zeros((0, 0))  # [layers, experts] device seconds per second
        self._time: float | None = None

    def observe(
        self,
        rows_per_s: npt.NDArray[np.float64],
        activations_per_s: npt.NDArray[np.float64],
        costs: BatchCost,
        now: float,
    ) -> None:
        """Adds the rates [layers, experts] at `now`, in seconds. Rates of another shape restart the smoothing."""
        latest = expert_load(cost_model_of(costs), rows_per_s, activations_per_s, costs.expert_bytes)
        if self._time is None or latest.shape != self.table.shape:
            self.table = latest
        else:
            kept = exp(-max(now - self._time, 0.0) / SMOOTHING_S)
            self.table = kept * self.table + (1.0 - kept) * latest
        self._time = now
