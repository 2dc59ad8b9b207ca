"""How long somebody who finds the queue full had better wait, told by how fast it moved lately."""

from __future__ import annotations

from collections import deque

_REMEMBERED = 64  # admissions: about two fillings of the default slots
_LEAST_S, _MOST_S, _UNKNOWN_S = 0.05, 60.0, 1.0


class AdmissionRate:
    """Requests that left the queue for a slot. Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, now: float) -> None:
        """A request was admitted."""
        self._times.append(now)

    def retry_after(self, waiting: int, now: float) -> float:
        """Seconds by which half of those `waiting` have started, at the rate seen: the others keep the engine busy."""
        times = tuple(self._times)  # another thread may be adding
        if not times or now <= times[0]:
            return _UNKNOWN_S
        return min(max(waiting / 2 * (now - times[0]) / len(times), _LEAST_S), _MOST_S)
