"""One request's life inside the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from moiety.core import FinishReason, Sampling, TopLogprobs
from moiety.errors import MoietyError
from moiety.router.guide import CompiledGuide, Matcher
from moiety.router.penalties import TokenCounts
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
    cached_tokens: int = 0


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
    guide: CompiledGuide | None = None
    prompt_logprobs: list[float] = field(default_factory=list)  # gathered in prefill, sent with the first token
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
        self._matcher.follow(self.tokens[self.prompt_tokens :])
        return self._matcher

    @property
    def prefilling(self) -> bool:
        return len(self.tokens) - self.computed > 1

    @property
    def given_up(self) -> bool:
        return self.cancelled or self.deadline.passed
