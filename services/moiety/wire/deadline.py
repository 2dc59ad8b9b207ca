"""A deadline is a value that every hop spends from."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True, order=True)
class Deadline:
    """A point of this process's monotonic clock; `Deadline()` never passes."""

    at: float = inf

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        return cls() if seconds is None else cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds left, 0 when passed, infinite when there is none."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self.at
