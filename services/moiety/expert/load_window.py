"""The load of a replica between two readings."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from moiety.core.load import ReplicaLoad


@dataclass(slots=True)
class _Sums:
    """Sums over the batches since `since`, a time of the monotonic clock."""

    since: float
    busy_s: float = 0.0
    wait_s: float = 0.0
    rows: int = 0
    calls: int = 0


class LoadWindow:
    """Adds up batches, on the runtime's thread, until another thread reads the load."""

    def __init__(self) -> None:
        self._sums = _Sums(time.monotonic())
        self._lock = threading.Lock()

    def add(self, busy_s: float, wait_s: float, rows: int, calls: int) -> None:
        """Adds a batch of `calls` calls, which together waited `wait_s` seconds for the device."""
        with self._lock:
            self._sums.busy_s += busy_s
            self._sums.wait_s += wait_s
            self._sums.rows += rows
            self._sums.calls += calls

    def read(self) -> ReplicaLoad:
        """Returns the load since the previous reading: busy fraction, queue wait and rates."""
        now = time.monotonic()
        with self._lock:
            sums, self._sums = self._sums, _Sums(now)
        span = max(now - sums.since, 1e-6)
        return ReplicaLoad(
            busy=min(1.0, sums.busy_s / span),
            queue_wait_ms=1000 * sums.wait_s / max(sums.calls, 1),
            rows_per_s=sums.rows / span,
            calls_per_s=sums.calls / span,
        )
