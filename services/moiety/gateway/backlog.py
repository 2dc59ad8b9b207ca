"""Who was refused and told to come again: a queue of promises instead of requests."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

LEAST_S = 0.05  # whoever comes back sooner costs more than the time is worth
MOST_S = 30.0  # nobody is sent away for longer, however many are expected before


class Backlog:
    """Spreads those who were refused over the time in which there will be room for them.

    Each is told the wait that is predicted behind all that are there and all that were told to come before: told the same,
    they would come together and be refused together, at a cost to those who are served.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._expected: list[float] = []  # a heap of when they come back

    def refuse(self, wait_s: Callable[[int], float]) -> float:
        """Seconds for one more to wait, of whom `wait_s` says how long it takes behind so many others."""
        now = self._clock()
        while self._expected and self._expected[0] <= now:
            heapq.heappop(self._expected)
        hint = min(max(wait_s(len(self._expected)), LEAST_S), MOST_S)
        heapq.heappush(self._expected, now + hint)
        return hint
