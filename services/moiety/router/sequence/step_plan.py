"""What one step computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from moiety.core.expert_backend import CallClass
from moiety.router.sequence.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of one sequence in a step, behind those that are computed."""

    sequence: Sequence
    count: int
    wanted: int  # how many of its last tokens need logits
    samples: bool  # whether they reach the sequence's last token, so that its next one is sampled
    encode: int = 0  # tokens of its prompt that go through the encoder first
    drafts: tuple[int, ...] = ()  # the last of the `count` tokens, where these are guesses that may follow the sequence

    @classmethod
    def of(cls, sequence: Sequence, count: int) -> Scheduled:
        """Logits of the last token where it is sampled from, or of all where those of the prompt are asked for."""
        samples = sequence.computed + count == len(sequence.tokens)
        wanted = count if sequence.scores_prompt else int(samples)
        return cls(sequence, count, wanted, samples, sequence.to_encode)

    def with_drafts(self, drafts: tuple[int, ...]) -> Scheduled:
        """A decoding sequence's token and behind it `drafts`, each of which is sampled from, too."""
        return replace(self, count=1 + len(drafts), wanted=1 + len(drafts), drafts=drafts)

    @property
    def work(self) -> int:
        """All tokens that it has the model compute."""
        return self.count + self.encode

    @property
    def ids(self) -> list[int]:
        """The tokens to be computed."""
        past = self.sequence.computed
        return [*self.sequence.tokens[past : past + self.count - len(self.drafts)], *self.drafts]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. Its logits have one row for each token that wants them, in the order of `scheduled`."""

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
        """Tokens, those of prompts that are encoded first among them."""
        return sum(item.work for item in self.scheduled)

    def split(self, parts: int) -> list[StepPlan]:
        """At most `parts` plans of about as many tokens each, none empty, that follow one another in this one."""
        plans: list[StepPlan] = []
        items: list[Scheduled] = []
        done, total = 0, self.work
        for item in self.scheduled:
            # The border goes where it is nearest to an equal share; sequences are never torn apart.
            if items and len(plans) < parts - 1 and 2 * done + item.work > 2 * total * (len(plans) + 1) // parts:
                plans.append(StepPlan(tuple(items)))
                items = []
            items.append(item)
            done += item.work
        return [*plans, StepPlan(tuple(items))]

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
