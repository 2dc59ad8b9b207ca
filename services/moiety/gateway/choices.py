"""The choices of one request: turns their tokens into responses, and builds requests that resume them on another router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from moiety.core.supervise import spawn
from moiety.gateway.stops import StopStrings
from moiety.gateway.text import Detokenizer, Tokenizer
from moiety.internal.v1 import engine_pb2
from moiety.v1 import generation_pb2


class ResponseBuilder:
    """Turns the engine's events for one request into the responses to its client."""

    def __init__(
        self, request: engine_pb2.EngineRequest, tokenizer: Tokenizer, stops: Sequence[str], continues: Sequence[int]
    ):
        """`continues`: the ids whose text the outputs continue, which are none for an encoder-decoder."""
        self.produced = 0  # tokens, of all choices
        self.ended: set[int] = set()  # choices whose last response has been created
        self.finish_reasons: list[generation_pb2.FinishReason] = []  # in the order in which choices ended
        self._request, self._began, self._cached = request, False, 0
        self._routed = self._rerouted = 0  # rows; both stay 0 unless experts may overflow
        self._texts = {choice: _Text(tokenizer, stops, continues) for choice in choices_of(request)}

    @property
    def complete(self) -> bool:
        return len(self.ended) == len(self._texts)

    def push(self, event: engine_pb2.EngineEvent) -> generation_pb2.GenerateResponse | None:
        """Returns the response to an event, or None where a stop string has already ended the event's choice."""
        if event.choice in self.ended:
            return None
        text = self._texts[event.choice]
        self.produced += len(event.token_ids)
        self._cached = max(self._cached, event.cached_tokens)
        self._routed += event.routed_rows
        self._rerouted += event.rerouted_rows
        piece, stopped = text.push(event.token_ids, self._request.sampling.min_tokens, last=bool(event.finish_reason))
        response = generation_pb2.GenerateResponse(
            text=piece,
            token_ids=event.token_ids,
            finish_reason=generation_pb2.FINISH_REASON_STOP if stopped else event.finish_reason,
            request_id="" if self._began else self._request.request_id,
            logprobs=event.logprobs,
            choice=event.choice,
            top_logprobs=event.top_logprobs,
            prompt_logprobs=event.prompt_logprobs,
        )
        self._began = True
        if response.finish_reason:
            self.ended.add(event.choice)
            self.finish_reasons.append(response.finish_reason)
            if self.complete:
                response.usage.prompt_tokens = len(self._request.prompt_ids)
                response.usage.completion_tokens = self.produced
                response.usage.cached_tokens = self._cached
                response.usage.rerouted = self._rerouted / self._routed if self._routed else 0.0
        return response


class _Text:
    """One choice: turns its tokens into text, up to its first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], continues: Sequence[int]):
        self._detokenizer, self._stops = Detokenizer(tokenizer, continues), StopStrings(stops)
        self._produced = 0
        self._exempt = 0  # characters of the first min_tokens tokens that the detokenizer still holds

    def push(self, ids: Sequence[int], min_tokens: int, *, last: bool) -> tuple[str, bool]:
        """Returns the text to send, and whether a stop string ends the choice here.

        The text of the first `min_tokens` tokens is not searched for stop strings.
        """
        early = ids[: max(min_tokens - self._produced, 0)]
        self._produced += len(ids)
        only_early = self._produced <= min_tokens
        sent = self._detokenizer.push(early, last=last and only_early) if early or only_early else ""
        if early and self._produced >= min_tokens:
            self._exempt = self._detokenizer.held
        if only_early:
            return sent, False
        text = self._detokenizer.push(ids[len(early) :], last=last)
        exempt = text[: self._exempt]
        self._exempt -= len(exempt)
        return sent + exempt + self._stops.push(text[len(exempt) :], last=last), self._stops.stopped


def choices_of(request: engine_pb2.EngineRequest) -> range:
    """Returns the choices that an engine request asks for."""
    return range(request.choice, request.choice + max(request.sampling.n, 1))


def resumed_request(request: engine_pb2.EngineRequest, choice: int, ids: Sequence[int]) -> engine_pb2.EngineRequest:
    """Returns a request for one choice of `request`, which resumes after the tokens `ids` that were already sent."""
    resumed = engine_pb2.EngineRequest()
    resumed.CopyFrom(request)
    resumed.choice, resumed.sampling.n = choice, 1
    resumed.generated_ids[:] = ids
    return resumed


async def merge_streams(
    streams: Sequence[AsyncGenerator[engine_pb2.EngineEvent, None]],
) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
    """Yields the events of all streams as they arrive. The first error ends all streams and is raised.

    At most one event of each waits to be taken: the others stay where their number is bounded (wire/event_stream/inbox.py).
    """
    events: asyncio.Queue[engine_pb2.EngineEvent | Exception | None] = asyncio.Queue(1)

    async def follow(stream: AsyncGenerator[engine_pb2.EngineEvent, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    await events.put(event)
            await events.put(None)
        except Exception as error:
            await events.put(error)

    tasks = [spawn("choice", follow(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                running -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
