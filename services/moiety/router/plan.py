"""What one step computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moiety.core import CallClass
from moiety.router.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of one sequence in a step, behind those that are computed."""

    sequence: Sequence
    count: int
    wanted: int  # how many of its last tokens need logits
    samples: bool  # whether the last of them is the sequence's last token, so that its next one is sampled

    @classmethod
    def of(cls, sequence: Sequence, count: int) -> Scheduled:
        """Logits of the last token where it is sampled from, or of all where those of the prompt are asked for."""
        samples = sequence.computed + count == len(sequence.tokens)
        return cls(sequence, count, count if sequence.scores_prompt else int(samples), samples)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. Its logits have one row for each token that wants them, in the order of `scheduled`."""

    scheduled: tuple[Scheduled, ...]

    @property
    def call_class(self) -> CallClass:
        decoding = all(item.count == 1 and item.samples for item in self.scheduled)
        return CallClass.DECODE if decoding else CallClass.PREFILL

    def rows(self) -> Iterator[tuple[Scheduled, range]]:
        """Which rows of the logits are an item's: those of its last `wanted` tokens. Items without any are left out."""
        start = 0
        for item in self.scheduled:
            if item.wanted:
                yield item, range(start, start + item.wanted)
                start += item.wanted

    def without(self, ended: Iterable[Sequence]) -> StepPlan:
        gone = set(map(id, ended))
        return StepPlan(tuple(item for item in self.scheduled if id(item.sequence) not in gone))

    def owners(self, tokens: Iterable[int]) -> list[Sequence]:
        """The sequences that own these positions of the packed step."""
        owners, start, wanted = [], 0, set(tokens)
        for item in self.scheduled:
            if not wanted.isdisjoint(range(start, start + item.count)):
                owners.append(item.sequence)
            start += item.count
        return owners
