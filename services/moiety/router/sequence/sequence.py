"""The state of one request, or of one of its choices, inside the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moiety.core.sampling import FinishReason, Sampling, TopLogprobs
from moiety.errors import MoietyError
from moiety.router.cache.blocks import BlockTable
from moiety.router.sequence.drafts import Drafter
from moiety.router.sequence.guides import CompiledGuide, Matcher
from moiety.router.sequence.token_counts import TokenCounts
from moiety.telemetry.tracing import NO_SPAN, Span
from moiety.wire.deadline import Deadline


@dataclass(frozen=True, slots=True)
class Emitted:
    """An event that one step sends to a request: a token, the end of the output, or both. An error ends the output too."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: FinishReason | None = None
    error: MoietyError | None = None
    choice: int = 0
    top_logprobs: tuple[TopLogprobs, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()
    cached_tokens: int = 0  # of the prompt; sent with a choice's first token
    queued_us: int = 0  # microseconds that the request waited for a slot; sent with a choice's first token
    routed_rows: int = 0  # (token, expert) rows since the choice's last event; 0 unless experts may overflow
    rerouted_rows: int = 0  # of routed_rows, those sent to another expert than the gate's


class SequenceFault(Exception):
    """Work for one sequence raised an exception that is not ours, `__cause__`. Other sequences are not affected."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(sequence.request_id)
        self.sequence = sequence


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: its tokens, cache blocks and progress.

    After `Engine.submit` only the engine's thread changes it, except for `cancelled`.
    """

    request_id: str
    tokens: list[int]  # prompt, tokens that a lost router generated, tokens generated here
    prompt_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]  # tokens that end the output: see `Sampling.ends`
    emit: Callable[[Emitted], None]  # called from the engine's thread
    deadline: Deadline = field(default_factory=Deadline)
    span: Span = NO_SPAN
    computed: int = 0  # tokens whose keys and values are in the cache
    cancelled: bool = False  # any thread may set it; it takes effect at the next step
    submitted_ns: int = field(default_factory=time.time_ns)
    choice: int = 0  # index; seed, choice and position determine the sampling noise
    priority: int = 0  # lower runs first
    tenant: str = ""
    host: str = ""  # of the client: hosts take turns, then the tenants of a host
    arrival: int = 0  # set by the scheduler: order of arrival within a priority
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    queued_us: int = 0  # microseconds from `submitted_ns` until it was first admitted
    admitted: bool = False  # whether it has run
    emitted: bool = False  # whether an event was sent
    ended: bool = False  # whether its last event was sent, or could not be sent
    routed_rows: int = 0  # as in Emitted, but since the start
    rerouted_rows: int = 0
    reported_rows: tuple[int, int] = (0, 0)  # routed_rows and rerouted_rows as of the last event
    table: BlockTable = field(default_factory=BlockTable)
    encoder_ids: tuple[int, ...] = ()  # an encoder-decoder's prompt; `tokens` are then the decoder's
    cross_table: BlockTable = field(default_factory=BlockTable)  # blocks for the keys and values of `encoder_ids`
    encoded: bool = False  # whether those keys and values are computed
    parent: Sequence | None = None  # the choice whose prompt this one shares
    siblings: tuple[Sequence, ...] = ()  # choices that start once this one's prompt is computed
    forked: tuple[Sequence, ...] = ()  # choices that have started
    guide: CompiledGuide | None = None
    prompt_logprobs: list[float] = field(default_factory=list)  # collected in prefill, sent with the first token
    prompt_top_logprobs: list[TopLogprobs] = field(default_factory=list)  # likewise
    drafter: Drafter | None = field(default=None, init=False)
    counts: TokenCounts = field(default_factory=TokenCounts, init=False)
    _matcher: Matcher | None = field(default=None, init=False)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        """Number of tokens of the prompt and the longest possible output: the most that the cache may have to hold."""
        return self.prompt_tokens + self.sampling.max_tokens

    def following_guide(self) -> Matcher:
        """Returns the guide's matcher, advanced to the end of the output. Only for sequences with a guide."""
        assert self.guide is not None
        if self._matcher is None:
            self._matcher = self.guide.matcher()
        given = self.sampling.first_token_id is not None  # the given first token is outside the guide
        self._matcher.follow(self.tokens[self.prompt_tokens + given :])
        return self._matcher

    @property
    def to_encode(self) -> int:
        """Number of prompt tokens that the encoder must compute before the decoder can start."""
        return 0 if self.encoded else len(self.encoder_ids)

    @property
    def prefilling(self) -> bool:
        return len(self.tokens) - self.computed > 1 or self.to_encode > 0

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether the request still needs the logits of every prompt token. If so, it cannot use the prefix cache."""
        return self.sampling.prompt_logprobs and self.generated == 0

    @property
    def may_draft(self) -> bool:
        """Whether tokens may ever be drafted: not if a guide or penalties depend on each token."""
        return self.guide is None and not self.sampling.penalised

    def with_drafts(self, tokens: tuple[int, ...]) -> Sequence:
        """Returns the sequence as if the drafts `tokens` were generated, to sample the token after them."""
        return replace(self, tokens=[*self.tokens, *tokens]) if tokens else self

    @property
    def slots(self) -> int:
        """Number of slots that the sequence takes: one for itself and one for each sibling that has not started."""
        return 1 + len(self.siblings)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Place among sequences. When memory is short, the running sequence with the highest rank loses its blocks first."""
        return self.priority, self.arrival, self.choice

    @property
    def is_cancelled(self) -> bool:
        """Whether the request was cancelled. Cancelling a request cancels all its choices."""
        return self.cancelled or (self.parent is not None and self.parent.cancelled)

    def must_end(self, now: float) -> bool:
        """Whether the sequence must end unfinished: it was cancelled, or its deadline has passed at `now` (monotonic clock)."""
        return now >= self.deadline.at or self.is_cancelled

    def restart(self) -> None:
        """Marks all tokens as not computed and the prompt as not encoded, after preemption has freed the sequence's blocks."""
        self.computed, self.encoded = 0, False
        self.prompt_logprobs, self.prompt_top_logprobs = [], []

    def sibling(self, choice: int, span: Span) -> Sequence:
        """Returns another choice of the same request, with the current tokens."""
        return replace(
            self,
            tokens=list(self.tokens),
            span=span,
            choice=choice,
            prompt_logprobs=[],  # only the first choice sends them
            prompt_top_logprobs=[],
            table=BlockTable(),
            cross_table=BlockTable(),
            parent=self,
        )
