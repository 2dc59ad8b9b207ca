"""Liveness by progress: a worker that has work must get on, and must not fail unit after unit."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

FACTOR = 8.0  # a unit may take this many times as long as units of its size have taken of late
FIRST_S = 30.0  # while nothing has shown how long units take: kernels are compiled, weights are paged in
LATE_S = 60.0  # "of late": the longest unit of the last one to two such spans counts
FORGET_S = 10.0  # failures that are older than this say nothing about now
LOOK_S = 2.0  # a judge that looks less often than this has been stopped itself, and starts over


@dataclass(slots=True)
class _Longest:
    """The longest units of one size class, in seconds."""

    since: float
    now: float = 0.0  # in the current span of LATE_S
    before: float = 0.0  # in the span before


class Progress:
    """Judges one worker: by the time that its current unit of work takes, and by the units that failed in a row.

    The worker calls `begin` and `end`, or `fail`; it has no lock, as one thread works. Any thread may call `problem`. Times are
    seconds of one monotonic clock, which callers pass in.
    """

    def __init__(self, most_failures: int, least_s: float) -> None:
        """`most_failures`: so many units that fail in a row make the worker sick. `least_s`: each may take so long."""
        self._most_failures, self._least_s = most_failures, least_s
        self._longest: dict[int, _Longest] = {}  # by size class, the number of bits of a unit's size
        self._unit: tuple[float, int] | None = None  # begin and size of the current unit
        self._looked = inf
        self._excused_until = -inf  # the current unit is judged as if it had begun then
        self.failures = 0  # in a row
        self._failed_at = -inf

    def begin(self, now: float, size: int = 1) -> None:
        """Notes that a unit begins. `size`: of what its time grows with, such as rows."""
        self._unit = now, size

    def end(self, now: float) -> None:
        """Notes that the unit has been done."""
        self.pause(now)
        self.failures = 0

    def pause(self, now: float) -> None:
        """Notes that the worker waits for others, or for work. It is not judged until the next `begin`."""
        if self._unit is None:
            return
        (began, size), self._unit = self._unit, None
        longest = self._longest.get(size.bit_length())
        if longest is None:
            longest = self._longest[size.bit_length()] = _Longest(now)
        elif now - longest.since > LATE_S:
            longest.since, longest.before, longest.now = now, longest.now, 0.0
        longest.now = max(longest.now, now - began)

    def fail(self, now: float) -> bool:
        """Notes that the unit failed. Returns whether none had failed in the FORGET_S before it: then it belongs in the log."""
        began = now if self._unit is None else self._unit[0]
        self._unit, first = None, began - self._failed_at > FORGET_S
        self.failures, self._failed_at = 1 if first else self.failures + 1, now
        return first

    def problem(self, now: float) -> str:
        """Returns why the worker is sick, or an empty text. Call it often: a judge that was stopped cannot judge."""
        if now - self._looked > LOOK_S:
            self._excused_until = now
        self._looked = now
        if self.failures >= self._most_failures and now - self._failed_at <= FORGET_S:
            return f"{self.failures} units of work failed in a row"
        if (unit := self._unit) is None:
            return ""
        began, size = unit
        took, limit = now - max(began, self._excused_until), self._limit(size.bit_length())
        return f"no progress for {took:.1f} s, the limit is {limit:.1f} s" if took > limit else ""

    def _limit(self, size: int) -> float:
        """Returns how many seconds a unit of a size class may take.

        A class without a measurement may take what the next smaller one took, in proportion to the size. That is too much
        rather than too little, since units have fixed costs.
        """
        known = max((other for other in tuple(self._longest) if other <= size), default=None)
        if known is None:
            return max(self._least_s, FIRST_S)
        longest = self._longest[known]
        return max(self._least_s, FACTOR * max(longest.now, longest.before) * 2.0 ** (size - known))
