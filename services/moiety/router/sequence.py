"""One request's life inside the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from moiety.core import FinishReason, Sampling
from moiety.errors import MoietyError
from moiety.router.blocks import BlockTable
from moiety.telemetry.tracing import NO_SPAN, Span
from moiety.wire.deadline import Deadline


@dataclass(frozen=True, slots=True)
class Emitted:
    """What one step brought a request: a token, its end, or both. An error ends it too."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: FinishReason | None = None
    error: MoietyError | None = None
    choice: int = 0
    cached_tokens: int = 0  # of the prompt; told with a choice's first token


@dataclass(slots=True, eq=False)
class Sequence:
    """Token ids so far, and how many of them are in the cache. Changed by the engine's thread only."""

    request_id: str
    tokens: list[int]  # prompt, what a lost router had generated, and what we generate
    prompt_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    emit: Callable[[Emitted], None]  # called from the engine's thread
    deadline: Deadline = field(default_factory=Deadline)
    span: Span = NO_SPAN
    computed: int = 0  # tokens whose keys and values are in the cache
    cancelled: bool = False  # set by any thread, honoured at the next step
    submitted_ns: int = field(default_factory=time.time_ns)
    choice: int = 0  # with seed and position it decides the sampling noise
    priority: int = 0  # lower runs first
    tenant: str = ""
    arrival: int = 0  # given by the scheduler: who came first, among equals
    cached_tokens: int = 0  # tokens of the prompt that were found in the prefix cache
    emitted: bool = False  # whether anything was sent yet
    table: BlockTable = field(default_factory=BlockTable)
    parent: Sequence | None = None  # the choice whose prompt this one shares
    siblings: tuple[Sequence, ...] = ()  # choices that are to begin when this one's prompt is computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        """The cache space it may come to need."""
        return self.prompt_tokens + self.sampling.max_tokens

    @property
    def prefilling(self) -> bool:
        return len(self.tokens) - self.computed > 1

    @property
    def scores_prompt(self) -> bool:
        """Whether the logits of every prompt token are still wanted, so that every one must be computed."""
        return self.sampling.prompt_logprobs and self.generated == 0

    @property
    def slots(self) -> int:
        """Places among the running sequences: one for each choice that it is, or is to become."""
        return 1 + len(self.siblings)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who keeps its blocks when there are too few: the lower goes before the higher."""
        return self.priority, self.arrival, self.choice

    @property
    def withdrawn(self) -> bool:
        """Whether the request was cancelled: all its choices are, together."""
        return self.cancelled or (self.parent is not None and self.parent.cancelled)

    def given_up(self, now: float) -> bool:
        """Whether it is to end without being done, at `now` of the monotonic clock."""
        return now >= self.deadline.at or self.withdrawn

    def sibling(self, choice: int, span: Span) -> Sequence:
        """Another choice of the same request, with the tokens it has now."""
        return Sequence(
            request_id=self.request_id,
            tokens=list(self.tokens),
            prompt_tokens=self.prompt_tokens,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            emit=self.emit,
            deadline=self.deadline,
            span=span,
            submitted_ns=self.submitted_ns,
            choice=choice,
            priority=self.priority,
            tenant=self.tenant,
            parent=self,
        )
