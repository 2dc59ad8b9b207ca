"""One request's life inside the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moiety.core.sampling import FinishReason, Sampling, TopLogprobs
from moiety.errors import MoietyError
from moiety.router.cache.blocks import BlockTable
from moiety.router.sampling.guides import CompiledGuide, Matcher
from moiety.router.sampling.penalties import TokenCounts
from moiety.router.sequence.drafts import Drafter
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
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    cached_tokens: int = 0  # of the prompt; told with a choice's first token
    routed_rows: int = 0  # (token, expert) rows since the choice's last event; 0 unless experts may overflow
    rerouted_rows: int = 0  # of these, those that went to another expert than the gate's


@dataclass(slots=True, eq=False)
class Sequence:
    """Token ids so far, and how many of them are in the cache. Changed by the engine's thread only."""

    request_id: str
    tokens: list[int]  # prompt, what a lost router had generated, and what we generate
    prompt_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]  # each ends the output: `Sampling.ends`
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
    admitted: bool = False  # whether it ever ran
    emitted: bool = False  # whether anything was sent yet
    routed_rows: int = 0  # as in Emitted, but since the beginning
    rerouted_rows: int = 0
    told_rows: tuple[int, int] = (0, 0)  # of these, routed and rerouted ones that were told of
    table: BlockTable = field(default_factory=BlockTable)
    encoder_ids: tuple[int, ...] = ()  # an encoder-decoder's prompt; `tokens` are its decoder's then
    cross_table: BlockTable = field(default_factory=BlockTable)  # where keys and values of `encoder_ids` lie
    encoded: bool = False  # whether they are there
    parent: Sequence | None = None  # the choice whose prompt this one shares
    siblings: tuple[Sequence, ...] = ()  # choices that are to begin when this one's prompt is computed
    guide: CompiledGuide | None = None
    prompt_logprobs: list[float] = field(default_factory=list)  # gathered in prefill, sent with the first token
    drafter: Drafter | None = field(default=None, init=False)
    counts: TokenCounts = field(default_factory=TokenCounts, init=False)
    _matcher: Matcher | None = field(default=None, init=False)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        """The cache space it may come to need."""
        return self.prompt_tokens + self.sampling.max_tokens

    def following_guide(self) -> Matcher:
        """Where the output stands in its guide. Only for sequences that have one."""
        assert self.guide is not None
        if self._matcher is None:
            self._matcher = self.guide.matcher()
        given = self.sampling.first_token_id is not None  # no part of what is guided
        self._matcher.follow(self.tokens[self.prompt_tokens + given :])
        return self._matcher

    @property
    def to_encode(self) -> int:
        """Tokens that the encoder is to compute before any of the decoder's."""
        return 0 if self.encoded else len(self.encoder_ids)

    @property
    def prefilling(self) -> bool:
        return len(self.tokens) - self.computed > 1 or self.to_encode > 0

    @property
    def held_blocks(self) -> int:
        """Blocks that it has, of either kind."""
        return len(self.table.held) + len(self.cross_table.held)

    @property
    def scores_prompt(self) -> bool:
        """Whether the logits of every prompt token are still wanted, so that every one must be computed."""
        return self.sampling.prompt_logprobs and self.generated == 0

    @property
    def drafts(self) -> bool:
        """Whether its next tokens may be guessed: not while tokens change the logits behind them, one after the other."""
        return self.generated > 0 and not self.prefilling and self.guide is None and not self.sampling.penalised

    def ahead(self, tokens: tuple[int, ...]) -> Sequence:
        """How the sampler is to see it behind further `tokens`; for nothing else."""
        return replace(self, tokens=[*self.tokens, *tokens]) if tokens else self

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

    def restart(self) -> None:
        """Its tokens are to be computed from the first on, and its prompt encoded again."""
        self.computed, self.encoded = 0, False
        self.prompt_logprobs = []

    def sibling(self, choice: int, span: Span) -> Sequence:
        """Another choice of the same request, with the tokens it has now."""
        return replace(
            self,
            tokens=list(self.tokens),
            span=span,
            choice=choice,
            prompt_logprobs=[],  # the first choice tells them
            table=BlockTable(),
            cross_table=BlockTable(),
            parent=self,
        )
