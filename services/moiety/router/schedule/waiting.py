"""The queue of waiting sequences. Order: lowest priority number, then tenants in turn, then arrival."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from moiety.router.sequence.sequence import Sequence


class WaitingQueue:
    """The sequences that wait to run. A waiting sequence holds no slot and no blocks."""

    def __init__(self) -> None:
        # priority -> tenant -> its sequences in order; the first tenant has the next turn.
        self._levels: dict[int, OrderedDict[str, deque[Sequence]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for level in self._levels.values():
            for queue in level.values():
                yield from queue

    def push(self, sequence: Sequence) -> None:
        """Adds a sequence at the end of its tenant's queue."""
        self._queue(sequence).append(sequence)
        self._count += 1

    def push_front(self, sequence: Sequence) -> None:
        """Adds a sequence at the front of its tenant's queue, and gives its tenant the next turn."""
        self._queue(sequence).appendleft(sequence)
        self._levels[sequence.priority].move_to_end(sequence.tenant, last=False)
        self._count += 1

    def first(self) -> Sequence | None:
        """Returns the next sequence, without removing it; None if none waits."""
        if not self._levels:
            return None
        return next(iter(self._levels[min(self._levels)].values()))[0]

    def pop(self) -> Sequence:
        """Removes and returns `first()`. The turn passes to the next tenant of its priority."""
        level = self._levels[min(self._levels)]
        tenant, queue = next(iter(level.items()))
        level.move_to_end(tenant)
        sequence = queue[0]
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> bool:
        """Removes a sequence. Returns False if it was not waiting."""
        level = self._levels.get(sequence.priority, OrderedDict())
        queue = level.get(sequence.tenant, deque())
        if sequence not in queue:
            return False
        queue.remove(sequence)
        self._count -= 1
        if not queue:
            del level[sequence.tenant]
        if not level:
            del self._levels[sequence.priority]
        return True

    def _queue(self, sequence: Sequence) -> deque[Sequence]:
        level = self._levels.setdefault(sequence.priority, OrderedDict())
        return level.setdefault(sequence.tenant, deque())
