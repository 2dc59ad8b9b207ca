"""Computes the retry delay of a request that finds the queue full, from the recent admission rate."""

from __future__ import annotations

from collections import deque

_REMEMBERED = 64  # admissions: about twice the default number of slots
_LEAST_S, _MOST_S, _UNKNOWN_S = 0.05, 60.0, 1.0


class AdmissionRate:
    """The times at which requests were admitted to a slot, in seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, now: float) -> None:
        """Records that a request was admitted."""
        self._times.append(now)

    def retry_after(self, waiting: int, now: float) -> float:
        """Returns the seconds in which half of the `waiting` requests start at the observed rate, at least 0.05 and at most 60.

        The other half keeps the engine busy until the refused client retries. Returns 1 s if no rate is known.
        """
        times = tuple(self._times)  # another thread may be adding
        if not times or now <= times[0]:
            return _UNKNOWN_S
        return min(max(waiting / 2 * (now - times[0]) / len(times), _LEAST_S), _MOST_S)
