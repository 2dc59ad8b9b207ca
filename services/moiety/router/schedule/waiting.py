"""The queue of waiting sequences. Order: lowest priority number, then hosts in turn, then their tenants, then arrival.

A tenant is a name that a client chooses. So a host that invents names gets no more turns than another host.

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

# Each tenant's sequences in order; the first tenant has the host's turn, and the first host has the turn.
_Queue = OrderedDict[Sequence, None]
_Hosts = OrderedDict[str, OrderedDict[str, _Queue]]


class WaitingQueue:
    """The sequences that wait to run. A waiting sequence holds no slot and no blocks."""

    def __init__(self) -> None:
        self._levels: dict[int, _Hosts] = {}  # by priority
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
            for tenants in level.values():
                for queue in tenants.values():
                    yield from queue

    def push(self, sequence: Sequence) -> None:
        """Adds a sequence at the end of its tenant's queue."""
        self._add(sequence)

    def push_front(self, sequence: Sequence) -> None:
        """Adds a sequence at the front of its tenant's queue, and gives its host and its tenant the next turn."""
        self._add(sequence).move_to_end(sequence, last=False)
        level = self._levels[sequence.priority]
        level.move_to_end(sequence.host, last=False)
        level[sequence.host].move_to_end(sequence.tenant, last=False)

    def first(self) -> Sequence | None:
        """Returns the next sequence, without removing it; None if none waits."""
        if not self._priorities:
            return None
        tenants = next(iter(self._levels[self._priorities[0]].values()))
        return next(iter(next(iter(tenants.values()))))

    def pop(self) -> Sequence:
        """Removes and returns `first()`. The turn passes to the next host of its priority, and to the host's next tenant."""
        level = self._levels[self._priorities[0]]
        host, tenants = next(iter(level.items()))
        tenant, queue = next(iter(tenants.items()))
        level.move_to_end(host)
        tenants.move_to_end(tenant)
        sequence = next(iter(queue))
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> bool:
        """Removes a sequence. Returns False if it was not waiting."""
        if sequence not in self._members:
            return False
        self._members.discard(sequence)
        level = self._levels[sequence.priority]
        tenants = level[sequence.host]
        del tenants[sequence.tenant][sequence]
        if not tenants[sequence.tenant]:
            del tenants[sequence.tenant]
        if not tenants:
            del level[sequence.host]
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

    def _add(self, sequence: Sequence) -> _Queue:
        if sequence.priority not in self._levels:
            self._levels[sequence.priority] = OrderedDict()
            insort(self._priorities, sequence.priority)
        tenants = self._levels[sequence.priority].setdefault(sequence.host, OrderedDict())
        queue = tenants.setdefault(sequence.tenant, OrderedDict())
        queue[sequence] = None
        self._members.add(sequence)
        if sequence.deadline.at < inf:
            heappush(self._deadlines, (sequence.deadline.at, next(self._numbers), sequence))
            if len(self._deadlines) > 2 * len(self._members) + 64:  # most have left: keep the others only
                kept = {entry[2]: entry for entry in self._deadlines if entry[2] in self._members}
                self._deadlines = list(kept.values())
                heapify(self._deadlines)
        return queue
