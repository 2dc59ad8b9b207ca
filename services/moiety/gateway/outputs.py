"""The choices of one request: turns a router's events into deltas."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from moiety.core.sampling import FinishReason, Sampling, TopLogprobs
from moiety.core.timings import Timings
from moiety.gateway.request import Delta, Usage
from moiety.gateway.text.output_text import OutputText
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.internal.v1.engine_pb2 import EngineEvent
from moiety.v1 import generation_pb2
from moiety.wire import finish_reason


class Outputs:
    """Turns the router's events for one request into deltas for its client."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        stops: Sequence[str],
        tokenizer: Tokenizer,
        *,
        special_stops: Mapping[int, str],
        continues: Sequence[int],
        keep_special: bool,
        arrived: float,
    ):
        """`special_stops`: those of `stops` that are special tokens, by id; they are among the stop ids of `sampling`.

        `continues`: the ids whose text the outputs continue, which are none for an encoder-decoder.

        `keep_special`: special tokens are part of the text, but for the one that ends it. `arrived`: when the request came,
        on the monotonic clock.
        """
        self.produced = 0  # tokens, of all choices
        self.ended: set[int] = set()  # choices whose last delta has been created
        self.finish_reasons: list[FinishReason] = []  # in the order in which choices ended
        self._prompt_ids, self._sampling, self._keep_special = prompt_ids, sampling, keep_special
        self._has_text, self._special_stops = tokenizer.kinds.has_text, special_stops
        self._cached = self._routed = self._rerouted = 0  # both numbers of rows stay 0 unless experts may overflow
        self._arrived, self._first, self._queued_s = arrived, 0.0, 0.0
        self._texts = [OutputText(tokenizer, stops, continues, special=keep_special) for _ in range(sampling.n)]

    @property
    def complete(self) -> bool:
        return len(self.ended) == len(self._texts)

    def push(self, event: EngineEvent) -> Delta | None:
        """Returns the delta of an event, or None where a stop string has already ended the event's choice."""
        choice = event.choice
        if choice in self.ended:
            return None
        text, ids = self._texts[choice], event.token_ids
        self.produced += len(ids)
        self._cached = max(self._cached, event.cached_tokens)
        self._routed += event.routed_rows
        self._rerouted += event.rerouted_rows
        began = not self._first
        if began:
            self._first, self._queued_s = time.monotonic(), event.queued_us / 1e6
        finish = finish_reason.FROM_WIRE[event.finish_reason]
        # Where special tokens are text, the one that ends the output is none.
        end = self._keep_special and finish is FinishReason.STOP and not self._has_text(ids[-1])
        piece = text.push(ids[:-1] if end else ids, self._sampling.min_tokens, last=finish is not None)
        matched: str | int | None = text.matched
        if matched is not None:
            finish = FinishReason.STOP
        elif finish is FinishReason.STOP and ids and ids[-1] in self._sampling.stop_token_ids:
            matched = self._special_stops.get(ids[-1], ids[-1])
        if finish is not None:
            self.ended.add(choice)
            self.finish_reasons.append(finish)
        delta = Delta(choice, piece, ids, finish=finish, matched_stop=matched)
        if event.logprobs:
            delta.logprobs = event.logprobs
            delta.top_logprobs = _top_logprobs(event.top_logprobs)
        if began:
            delta.prompt_ids = self._prompt_ids
        if event.prompt_logprobs:
            delta.prompt_logprobs = event.prompt_logprobs
            delta.prompt_top_logprobs = _top_logprobs(event.prompt_top_logprobs)
        if finish is not None and self.complete:
            delta.usage, delta.timings = self._usage(), self._timings()
        return delta

    def _usage(self) -> Usage:
        rerouted = self._rerouted / self._routed if self._routed else 0.0
        return Usage(len(self._prompt_ids), self.produced, self._cached, rerouted)

    def _timings(self) -> Timings:
        to_first = self._first - self._arrived
        queued_s = min(self._queued_s, to_first)
        return Timings(queued_s, to_first - queued_s, time.monotonic() - self._first)


def _top_logprobs(received: Iterable[generation_pb2.TopLogprobs]) -> list[TopLogprobs]:
    return [TopLogprobs(tuple(top.token_ids), tuple(top.logprobs)) for top in received]
