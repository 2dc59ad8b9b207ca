"""Deadlines: one point in time per request. Each service passes on the seconds that are left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """A point in time on this process's monotonic clock; `Deadline()` never passes."""

    at: float = inf

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Returns the deadline `seconds` from now, or one that never passes if `seconds` is None."""
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Returns the seconds left: 0 once the deadline has passed, infinity if it never passes."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at
