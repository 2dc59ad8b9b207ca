"""The plan of one step: which tokens of which sequences it computes, and which need logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from moiety.core.expert_backend import CallClass
from moiety.router.sequence.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The next `count` uncomputed tokens of one sequence, as its part of a step."""

    sequence: Sequence
    count: int
    wanted: int  # how many of the last of the `count` tokens need logits
    samples: bool  # whether the `count` tokens include the sequence's last one, so that its next token is sampled
    encode: int = 0  # prompt tokens that the encoder computes first
    drafts: tuple[int, ...] = ()  # guesses at the next tokens; they are the last of the `count` tokens

    @classmethod
    def of(cls, sequence: Sequence, count: int) -> Scheduled:
        """Schedules the next `count` tokens of a sequence.

        The sequence's last token, if it is among them, needs logits to sample the next one. For prompt log probabilities
        all `count` tokens need logits.
        """
        samples = sequence.computed + count == len(sequence.tokens)
        wanted = count if sequence.needs_prompt_logits else int(samples)
        return cls(sequence, count, wanted, samples, sequence.to_encode)

    def with_drafts(self, drafts: tuple[int, ...]) -> Scheduled:
        """Returns this part, one token of a decoding sequence, with `drafts` after it. All these tokens need logits."""
        return replace(self, count=1 + len(drafts), wanted=1 + len(drafts), drafts=drafts)

    @property
    def work(self) -> int:
        """Number of tokens to compute: `count` in the decoder, `encode` in the encoder."""
        return self.count + self.encode

    @property
    def ids(self) -> list[int]:
        """Ids of the decoder's tokens to compute, drafts last."""
        past = self.sequence.computed
        return [*self.sequence.tokens[past : past + self.count - len(self.drafts)], *self.drafts]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. Its logits have one row for each token that needs them, in the order of `scheduled`."""

    scheduled: tuple[Scheduled, ...]

    @property
    def call_class(self) -> CallClass:
        decoding = all(item.work == 1 + len(item.drafts) and item.samples for item in self.scheduled)
        return CallClass.DECODE if decoding else CallClass.PREFILL

    @property
    def tokens(self) -> int:
        return sum(item.count for item in self.scheduled)

    @property
    def work(self) -> int:
        """Number of tokens to compute, including prompt tokens that the encoder computes."""
        return sum(item.work for item in self.scheduled)

    def split(self, parts: int) -> list[StepPlan]:
        """Splits the plan into at most `parts` consecutive plans of about equal work, none of them empty."""
        plans: list[StepPlan] = []
        items: list[Scheduled] = []
        done, total = 0, self.work
        for item in self.scheduled:
            # Cut where the parts come closest to equal shares, between sequences only.
            if items and len(plans) < parts - 1 and 2 * done + item.work > 2 * total * (len(plans) + 1) // parts:
                plans.append(StepPlan(tuple(items)))
                items = []
            items.append(item)
            done += item.work
        return [*plans, StepPlan(tuple(items))]

    def rows(self) -> Iterator[tuple[Scheduled, range]]:
        """Yields each scheduled item that needs logits, with the range of its rows in the step's logits."""
        start = 0
        for item in self.scheduled:
            if item.wanted:
                yield item, range(start, start + item.wanted)
                start += item.wanted

    def without(self, ended: Iterable[Sequence]) -> StepPlan:
        """Returns the plan without these sequences."""
        gone = set(map(id, ended))
        return StepPlan(tuple(item for item in self.scheduled if id(item.sequence) not in gone))

    def owners(self, tokens: Iterable[int]) -> list[Sequence]:
        """Returns the sequences that own the tokens at these positions of the packed step."""
        owners, start, wanted = [], 0, set(tokens)
        for item in self.scheduled:
            if not wanted.isdisjoint(range(start, start + item.count)):
                owners.append(item.sequence)
            start += item.count
        return owners
