"""What runs next: admits waiting sequences, and packs a step from decode tokens and prefill chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from moiety.core import CallClass
from moiety.router.kvcache import KVCache
from moiety.router.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of one sequence in a step."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that its next one is sampled."""
        return self.sequence.computed + self.count == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass."""

    scheduled: tuple[Scheduled, ...]

    @property
    def call_class(self) -> CallClass:
        decoding = all(item.count == 1 and item.samples for item in self.scheduled)
        return CallClass.DECODE if decoding else CallClass.PREFILL

    def without(self, ended: Iterable[Sequence]) -> StepPlan:
        gone = set(map(id, ended))
        return StepPlan(tuple(item for item in self.scheduled if id(item.sequence) not in gone))


class Scheduler:
    """First come, first served. Decode goes first, so that running streams never wait for somebody's prompt."""

    def __init__(self, cache: KVCache, slots: int, token_budget: int):
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._cache, self._slots, self._token_budget = cache, slots, token_budget

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences to running while slots and cache last; returns those admitted."""
        admitted = []
        while self.waiting and len(self.running) < self._slots:
            if not self._cache.reserve(self.waiting[0].request_id, self.waiting[0].most_tokens):
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def plan(self) -> StepPlan:
        """Every decoding sequence's token, then prompt chunks as far as the token budget goes; may be empty."""
        decoding = [sequence for sequence in self.running if not sequence.prefilling]
        scheduled = [Scheduled(sequence, 1) for sequence in decoding]
        left = max(self._token_budget - len(scheduled), 0)
        for sequence in self.running:
            if sequence.prefilling and left > 0:
                count = min(left, len(sequence.tokens) - sequence.computed)
                scheduled.append(Scheduled(sequence, count))
                left -= count
        return StepPlan(tuple(scheduled))

    def remove(self, sequence: Sequence) -> None:
        """Frees whatever the sequence holds, running or waiting."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._cache.release(sequence.request_id)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
