"""The rows of a layer that no live replica can take now, and how long they have waited."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

import numpy as np

from moiety.errors import MoietyError, NoHolder, ResourceExhausted
from moiety.telemetry.tracing import NO_SPAN, Span

POLL_S = 0.05  # how often a parked layer tries again and looks for cancelled requests

_NONE = np.empty(0, dtype=np.int64)


class ParkedRows:
    """The parked rows of one layer, which is parked while there are any. Times are seconds of `time.monotonic()`."""

    def __init__(self) -> None:
        self.assignments = _NONE  # indices into the layer's A assignments, ascending
        self.retry_at = inf
        self._since: float | None = None  # None: the layer is not parked
        self._before_s = 0.0  # time spent parked before that
        self._span: Span = NO_SPAN
        self._stop_listening: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.assignments)

    @property
    def waited_s(self) -> float:
        """Seconds that the layer has been parked, all its waits together."""
        return self._before_s + (0.0 if self._since is None else time.monotonic() - self._since)

    def add(
        self, assignments: np.ndarray, start_span: Callable[[], Span], listen: Callable[[], Callable[[], None]]
    ) -> None:
        """Parks `assignments`. If the layer was not parked, opens its span and calls `listen`, which returns how to stop."""
        self.assignments = np.union1d(self.assignments, assignments)
        if self._since is None:
            self._since, self._span, self._stop_listening = time.monotonic(), start_span(), listen()
        self.retry_at = time.monotonic() + POLL_S

    def take(self) -> np.ndarray:
        """Returns the parked assignments, for another try. The layer stays parked until `end`."""
        taken, self.assignments = self.assignments, _NONE
        return taken

    def end(self) -> None:
        """Ends the wait, if there is one."""
        if self._since is not None:
            self._stop_listening()
            self._before_s, self._since, self.retry_at = self.waited_s, None, inf
            self._span.end()


def wait_error(layer: int, experts: list[int], missing: list[int], waited_s: float) -> MoietyError:
    """Returns why rows for `experts` end that were parked for `waited_s`; those in `missing` have no holder."""
    if missing:
        return NoHolder(layer, missing, waited_s)
    what = f"all holders of expert(s) {experts} of MoE layer {layer} are overloaded"
    return ResourceExhausted(f"{what}; waited {waited_s:.1f} s for room", 1.0)
