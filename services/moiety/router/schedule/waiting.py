"""The queue of waiting sequences. Order: lowest priority number, then tenants in turn, then arrival.

Each operation takes the same time however many sequences wait, apart from a logarithm and amortised over many operations.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from moiety.router.sequence.sequence import Sequence

_Tenants = OrderedDict[
    str, OrderedDict[Sequence, None]
]  # each tenant's sequences in order; the first tenant has the turn


class WaitingQueue:
    """The sequences that wait to run. A waiting sequence holds no slot and no blocks."""

    def __init__(self) -> None:
        self._levels: dict[int, _Tenants] = {}  # by priority
        self._priorities: list[int] = []  # of `_levels`, ascending
        self._members: set[Sequence] = set()
        # (deadline, number, sequence), a heap; also of sequences that have left the queue since
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members

    def __iter__(self) -> Iterator[Sequence]:
        for level in self._levels.values():
            for queue in level.values():
                yield from queue

    def push(self, sequence: Sequence) -> None:
        """Adds a sequence at the end of its tenant's queue."""
        self._add(sequence)

    def push_front(self, sequence: Sequence) -> None:
        """Adds a sequence at the front of its tenant's queue, and gives its tenant the next turn."""
        self._add(sequence).move_to_end(sequence, last=False)
        self._levels[sequence.priority].move_to_end(sequence.tenant, last=False)

    def first(self) -> Sequence | None:
        """Returns the next sequence, without removing it; None if none waits."""
        if not self._priorities:
            return None
        return next(iter(next(iter(self._levels[self._priorities[0]].values()))))

    def pop(self) -> Sequence:
        """Removes and returns `first()`. The turn passes to the next tenant of its priority."""
        level = self._levels[self._priorities[0]]
        tenant, queue = next(iter(level.items()))
        level.move_to_end(tenant)
        sequence = next(iter(queue))
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> bool:
        """Removes a sequence. Returns False if it was not waiting."""
        if sequence not in self._members:
            return False
        self._members.discard(sequence)
        level = self._levels[sequence.priority]
        queue = level[sequence.tenant]
        del queue[sequence]
        if not queue:
            del level[sequence.tenant]
        if not level:
            del self._levels[sequence.priority]
            del self._priorities[bisect_left(self._priorities, sequence.priority)]
        return True

    def late(self, now: float) -> list[Sequence]:
        """Returns the sequences whose deadline has passed at `now` (monotonic clock). Each is returned once."""
        late: dict[Sequence, None] = {}
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heappop(self._deadlines)[2]
            if sequence in self._members:
                late[sequence] = None
        return list(late)

    def _add(self, sequence: Sequence) -> OrderedDict[Sequence, None]:
        if sequence.priority not in self._levels:
            self._levels[sequence.priority] = OrderedDict()
            insort(self._priorities, sequence.priority)
        queue = self._levels[sequence.priority].setdefault(sequence.tenant, OrderedDict())
        queue[sequence] = None
        self._members.add(sequence)
        if sequence.deadline.at < inf:
            heappush(self._deadlines, (sequence.deadline.at, next(self._numbers), sequence))
            if len(self._deadlines) > 2 * len(self._members) + 64:  # most have left: keep the others only
                kept = {entry[2]: entry for entry in self._deadlines if entry[2] in self._members}
                self._deadlines = list(kept.values())
                heapify(self._deadlines)
        return queue
