"""When a slow call is sent to a second replica, and how often that may happen."""

from __future__ import annotations

from collections import deque

from moiety.core.expert_backend import CallClass

WINDOW = 128  # calls per (layer, class) that the p99 is taken over
FEWEST = 16  # answers between two looks at the window: fewer say nothing of a p99
UNKNOWN_S = 1.0  # the wait until then: first calls pay for warming up
BURST = 10.0  # hedges allowed beyond the budget at once, so that one hung replica is bridged at once


class Hedging:
    """Latency statistics and the hedge budget of one router. Used by the engine's thread only."""

    def __init__(self, least_s: float, budget: float, factor: float = 3.0):
        """A hedge fires past `max(factor * p99, least_s)`; hedges are at most `budget` of all calls."""
        self.least_s, self._budget, self._factor = least_s, budget, factor
        self._tokens = BURST
        self._latencies: dict[tuple[int, CallClass], deque[float]] = {}
        self._after: dict[tuple[int, CallClass], float] = {}
        self._answers: dict[tuple[int, CallClass], int] = {}

    def after(self, layer: int, call_class: CallClass) -> float:
        """Seconds to wait for an answer before a second call."""
        return self._after.get((layer, call_class), max(UNKNOWN_S, self.least_s))

    def sent(self) -> None:
        self._tokens = min(BURST, self._tokens + self._budget)

    def allowed(self) -> bool:
        """Takes one hedge from the budget, if there is one."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def answered(self, layer: int, call_class: CallClass, seconds: float) -> None:
        key = (layer, call_class)
        if (window := self._latencies.get(key)) is None:
            window = self._latencies[key] = deque(maxlen=WINDOW)
        window.append(seconds)
        self._answers[key] = answers = self._answers.get(key, 0) + 1
        if answers % FEWEST == 0:
            p99 = sorted(window)[int(0.99 * (len(window) - 1))]
            self._after[key] = max(self._factor * p99, self.least_s)
