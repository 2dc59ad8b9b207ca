"""A generation as a whole: what its chunks amount to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from moiety.client.chunk import Chunk
from moiety.core.sampling import FinishReason, TopLogprobs
from moiety.core.timings import Timings


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` outputs of a request."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None  # the stop string or stop token of the request that ended it
    logprobs: tuple[float, ...] = ()  # of token_ids, where asked for
    top_logprobs: tuple[TopLogprobs, ...] = ()  # likewise


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation. `text`, `token_ids` and `finish_reason` are those of the first choice."""

    choices: tuple[Choice, ...]
    prompt_tokens: int = 0
    completion_tokens: int = 0  # of all choices
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    rerouted: float = 0.0  # fraction of rows that another expert computed
    prompt_logprobs: tuple[float, ...] = ()  # of the prompt's tokens except the first, where asked for
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()  # likewise
    timings: Timings | None = None
    request_id: str = ""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason


def completion_of(chunks: Iterable[Chunk]) -> Completion:
    """Returns what the chunks of one stream, in the order in which they came, amount to."""
    drafts: dict[int, _Draft] = {}
    whole = Completion(())
    for chunk in chunks:
        drafts.setdefault(chunk.choice, _Draft()).add(chunk)
        if chunk.prompt_logprobs:
            whole = replace(whole, prompt_logprobs=chunk.prompt_logprobs, prompt_top_logprobs=chunk.prompt_top_logprobs)
        if chunk.request_id:
            whole = replace(whole, request_id=chunk.request_id)
        if chunk.prompt_tokens:
            whole = replace(
                whole,
                prompt_tokens=chunk.prompt_tokens,
                completion_tokens=chunk.completion_tokens,
                cached_tokens=chunk.cached_tokens,
                rerouted=chunk.rerouted,
                timings=chunk.timings,
            )
    return replace(whole, choices=tuple(drafts[choice].choice() for choice in sorted(drafts)))


@dataclass(slots=True)
class _Draft:
    """One choice as it grows."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    last: Chunk | None = None

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.top_logprobs += chunk.top_logprobs
        self.last = chunk

    def choice(self) -> Choice:
        assert self.last is not None
        return Choice(
            "".join(self.texts),
            tuple(self.token_ids),
            self.last.finish_reason,
            self.last.matched_stop,
            tuple(self.logprobs),
            tuple(self.top_logprobs),
        )
