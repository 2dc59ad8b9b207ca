"""Decides when a slow call is also sent to a second replica, and limits how often."""

from __future__ import annotations

from collections import deque

from moiety.core.expert_backend import CallClass

WINDOW = 128  # calls per (layer, class) that the p99 is taken over
FEWEST = 16  # answers between two updates of the p99: fewer do not determine one
UNKNOWN_S = 1.0  # hedge delay before the first p99: first calls include warm-up
BURST = 10.0  # hedges that may go out at once beyond the budget, so that one hung replica is bridged at once


class Hedging:
    """Latency statistics and the hedge budget of one router. Used by the engine's thread only."""

    def __init__(self, least_s: float, budget: float, factor: float = 3.0):
        """A hedge fires after `max(factor * p99, least_s)` seconds; `budget` is the fraction of calls that may be hedged."""
        self.least_s, self._budget, self._factor = least_s, budget, factor
        self._tokens = BURST
        self._latencies: dict[tuple[int, CallClass], deque[float]] = {}
        self._after: dict[tuple[int, CallClass], float] = {}
        self._answers: dict[tuple[int, CallClass], int] = {}

    def delay(self, layer: int, call_class: CallClass) -> float:
        """Returns the seconds to wait for an answer before a second call."""
        return self._after.get((layer, call_class), max(UNKNOWN_S, self.least_s))

    def count_call(self) -> None:
        self._tokens = min(BURST, self._tokens + self._budget)

    def take(self) -> bool:
        """Takes one hedge from the budget. Returns False if none is left."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def record_latency(self, layer: int, call_class: CallClass, seconds: float) -> None:
        key = (layer, call_class)
        if (window := self._latencies.get(key)) is None:
            window = self._latencies[key] = deque(maxlen=WINDOW)
        window.append(seconds)
        self._answers[key] = answers = self._answers.get(key, 0) + 1
        if answers % FEWEST == 0:
            p99 = sorted(window)[int(0.99 * (len(window) - 1))]
            self._after[key] = max(self._factor * p99, self.least_s)
