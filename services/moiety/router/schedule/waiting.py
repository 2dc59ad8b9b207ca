"""Who waits, and who is next: the lowest priority number, within it one tenant after the other, then first come."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from moiety.router.sequence.sequence import Sequence


class WaitingQueue:
    """Sequences that hold neither slot nor blocks."""

    def __init__(self) -> None:
        # priority -> tenant -> its sequences; the first tenant is the one whose turn it is.
        self._levels: dict[int, OrderedDict[str, deque[Sequence]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for level in self._levels.values():
            for line in level.values():
                yield from line

    def push(self, sequence: Sequence) -> None:
        """At the end of its tenant's line."""
        self._line(sequence).append(sequence)
        self._count += 1

    def push_front(self, sequence: Sequence) -> None:
        """Back to where it came from: next of its tenant, whose turn it is again."""
        self._line(sequence).appendleft(sequence)
        self._levels[sequence.priority].move_to_end(sequence.tenant, last=False)
        self._count += 1

    def first(self) -> Sequence | None:
        """Who is next."""
        if not self._levels:
            return None
        return next(iter(self._levels[min(self._levels)].values()))[0]

    def pop(self) -> Sequence:
        """Takes out `first()`; the turn passes to the next tenant of its priority."""
        level = self._levels[min(self._levels)]
        tenant, line = next(iter(level.items()))
        level.move_to_end(tenant)
        sequence = line[0]
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> bool:
        """Whether it waited here."""
        level = self._levels.get(sequence.priority, OrderedDict())
        line = level.get(sequence.tenant, deque())
        if sequence not in line:
            return False
        line.remove(sequence)
        self._count -= 1
        if not line:
            del level[sequence.tenant]
        if not level:
            del self._levels[sequence.priority]
        return True

    def _line(self, sequence: Sequence) -> deque[Sequence]:
        level = self._levels.setdefault(sequence.priority, OrderedDict())
        return level.setdefault(sequence.tenant, deque())
