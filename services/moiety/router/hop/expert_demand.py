"""Counts the rows routed to each expert; the load ledger gets the running totals once a second."""

from __future__ import annotations

import threading

import numpy as np

from moiety.core.load import BatchCost, ExpertDemand


class ExpertDemandCounter:
    """Counts rows and activations per (layer, expert); an activation is a dispatch with at least one row for the expert.

    Engine threads count, the heartbeat reads.
    """

    def __init__(self, layers: int, experts: int, started: float = 0.0):
        """`started`: Unix seconds at which the counters were zero; 0 = unknown."""
        self._started = started
        self._rows = np.zeros((layers, experts), dtype=np.int64)
        self._activations = np.zeros((layers, experts), dtype=np.int64)
        self._lock = threading.Lock()

    def count(self, layer: int, experts: np.ndarray) -> None:
        """Adds one dispatch of `layer`; `experts` holds the expert id of every row."""
        rows = np.bincount(experts, minlength=self._rows.shape[1])
        with self._lock:
            self._rows[layer] += rows
            self._activations[layer] += rows > 0

    def total(self) -> int:
        """Returns the rows counted so far over all layers and experts."""
        with self._lock:
            return int(self._rows.sum())

    def reading(self, now: float, costs: tuple[BatchCost, ...] = ()) -> ExpertDemand:
        """Returns the totals so far. `now`: Unix seconds at this reading. `costs`: batch costs that the router has fitted."""
        with self._lock:
            rows, activations = self._rows.tolist(), self._activations.tolist()
        return ExpertDemand(tuple(map(tuple, rows)), tuple(map(tuple, activations)), now, self._started, costs)
