"""What the clients return, as values, and how they read it from messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moiety.core.sampling import FinishReason, TopLogprobs
from moiety.core.timings import Timings
from moiety.v1 import generation_pb2
from moiety.wire import finish_reason


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message of a generation's stream: new tokens of one choice, and their text."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None  # on the last chunk of each choice
    prompt_tokens: int = 0  # on the last chunk
    completion_tokens: int = 0  # on the last chunk, of all choices
    cached_tokens: int = 0  # on the last chunk: of the prompt, found in the prefix cache
    rerouted: float = 0.0  # on the last chunk: fraction of rows that another expert computed, see Usage
    request_id: str = ""  # on the first chunk
    choice: int = 0  # that the tokens belong to: 0 to n - 1
    logprobs: tuple[float, ...] = ()  # of token_ids
    top_logprobs: tuple[TopLogprobs, ...] = ()  # one for each of token_ids
    prompt_logprobs: tuple[float, ...] = ()  # of the prompt's tokens except the first; on one chunk only
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()  # one for each of prompt_logprobs
    matched_stop: str | int | None = None  # the stop string or stop token of the request that ended the choice
    timings: Timings | None = None  # on the last chunk


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a gateway serves."""

    name: str
    revision: str
    max_context: int


def chunk_of(response: generation_pb2.GenerateResponse) -> Chunk:
    """Returns a message of a generation's stream as a value."""
    matched = response.WhichOneof("matched") if response.finish_reason else None
    return Chunk(
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=finish_reason.FROM_WIRE[response.finish_reason],
        prompt_tokens=response.usage.prompt_tokens,
        completion_tokens=response.usage.completion_tokens,
        cached_tokens=response.usage.cached_tokens,
        rerouted=response.usage.rerouted,
        request_id=response.request_id,
        choice=response.choice,
        logprobs=tuple(response.logprobs),
        top_logprobs=_top_logprobs(response.top_logprobs),
        prompt_logprobs=tuple(response.prompt_logprobs),
        prompt_top_logprobs=_top_logprobs(response.prompt_top_logprobs),
        matched_stop=getattr(response, matched) if matched else None,
        timings=_timings(response.timings) if response.finish_reason and response.HasField("timings") else None,
    )


def models_of(response: generation_pb2.ListModelsResponse) -> tuple[ModelInfo, ...]:
    """Returns the models that a gateway lists."""
    return tuple(ModelInfo(model.name, model.revision, model.max_context) for model in response.models)


def _top_logprobs(received: Iterable[generation_pb2.TopLogprobs]) -> tuple[TopLogprobs, ...]:
    return tuple(TopLogprobs(tuple(top.token_ids), tuple(top.logprobs)) for top in received)


def _timings(received: generation_pb2.Timings) -> Timings:
    return Timings(received.queued, received.prefill, received.decode)
