"""Counts requests that were refused with a retry delay, and spreads their return over time."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

LEAST_S = 0.05  # shortest retry delay: an earlier retry costs more than the time is worth
MOST_S = 30.0  # longest retry delay, however many requests are expected before


class Backlog:
    """Computes retry delays that spread refused requests over the time in which there will be capacity for them.

    A refused request's delay is its predicted wait behind all present requests and all refused ones that are expected back.
    With equal delays, refused requests would return together and be refused together. Each refusal takes time from the
    requests that are being served.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._expected: list[float] = []  # heap: when each refused request is expected back

    def refuse(self, wait_s: Callable[[int], float]) -> float:
        """Returns the retry delay, in seconds, of one more refused request, and expects the request back after it.

        `wait_s(n)` predicts the wait behind the present requests and n refused ones that are expected back.
        """
        now = self._clock()
        while self._expected and self._expected[0] <= now:
            heapq.heappop(self._expected)
        hint = min(max(wait_s(len(self._expected)), LEAST_S), MOST_S)
        heapq.heappush(self._expected, now + hint)
        return hint
