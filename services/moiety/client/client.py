"""The Python client of moiety.v1.GenerationService."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import grpc

from moiety.client.retry import stream_with_retries
from moiety.core.sampling import FinishReason, TopLogprobs
from moiety.errors import InvalidRequest, MoietyError
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_TRACER, Tracer
from moiety.v1 import generation_pb2, generation_pb2_grpc
from moiety.wire import finish_reason, status
from moiety.wire.channels import PING_TIMEOUT_S, channel
from moiety.wire.trace_context import with_traceparent


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


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a gateway serves."""

    name: str
    revision: str
    max_context: int


class Client:
    """Streams generations from a gateway. An async context manager; one channel, any number of streams."""

    def __init__(self, address: str, tracer: Tracer = NO_TRACER, *, ping_timeout_s: float = PING_TIMEOUT_S):
        """`ping_timeout_s`: a gateway that does not answer a ping for so long is lost, and its streams end with PeerLost.

        Pings wait behind the data sent before them: raise the time where a prompt takes longer to send.
        """
        self.address = address
        self._tracer = tracer
        self._channel = channel(address, ping_timeout_s)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        min_tokens: int | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
        top_logprobs: int | None = None,
        prompt_logprobs: bool = False,
        n: int | None = None,
        json_schema: str | Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        first_token: str | int | None = None,
        priority: int = 0,
        tenant: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
        retries: int = 0,
    ) -> AsyncIterator[Chunk]:
        """Yields chunks as they arrive. Leaving the loop cancels the request. Raises the gateway's error (errors.py).

        A request that is refused because a queue is full (ResourceExhausted) is retried up to `retries` times, after the
        gateway's retry delay and within `timeout_s`.
        generation.proto describes the options. At most one of `json_schema` (JSON text or the schema itself), `regex` and
        `grammar` (Lark syntax) guides the output. `first_token` is the text or the id of a token.
        """
        sampling = generation_pb2.SamplingParams(
            ignore_eos=ignore_eos, logprobs=logprobs, prompt_logprobs=prompt_logprobs
        )
        scalars = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "min_tokens": min_tokens,
            "top_logprobs": top_logprobs,
            "n": n,
            "first_token" if isinstance(first_token, str) else "first_token_id": first_token,
        }
        for name, value in scalars.items():
            if value is not None:
                with _expressible(f"sampling.{name}", value):
                    setattr(sampling, name, value)
        with _expressible("sampling.logit_bias", logit_bias):
            sampling.logit_bias.update(logit_bias or {})
        with _expressible("sampling.stop", stop):
            sampling.stop.extend([stop] if isinstance(stop, str) else stop)
        with _expressible("sampling.stop_token_ids", stop_token_ids):
            sampling.stop_token_ids.extend(stop_token_ids)
        _set_guide(sampling, json_schema, regex, grammar)
        request = generation_pb2.GenerateRequest(model=model, sampling=sampling, request_id=request_id, tenant=tenant)
        with _expressible("priority", priority):
            request.priority = priority
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
        span = self._tracer.start(
            SpanName.CLIENT_GENERATE, parent=None, attributes={Attribute.SERVER_ADDRESS: self.address}
        )
        metadata = with_traceparent(span.traceparent)

        def call(left_s: float | None) -> grpc.aio.UnaryStreamCall:
            return self._stub.Generate(request, timeout=left_s, metadata=metadata)

        try:
            async with aclosing(stream_with_retries(call, retries, timeout_s)) as responses:
                async for response in responses:
                    yield Chunk(
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
                        top_logprobs=tuple(
                            TopLogprobs(tuple(top.token_ids), tuple(top.logprobs)) for top in response.top_logprobs
                        ),
                        prompt_logprobs=tuple(response.prompt_logprobs),
                    )
        except MoietyError as error:
            span.error(error)
            raise
        finally:
            span.end()

    async def models(self, timeout_s: float = 10.0) -> tuple[ModelInfo, ...]:
        """Returns the models that the gateway serves. Raises Unavailable while no router is ready."""
        try:
            response = await self._stub.ListModels(generation_pb2.ListModelsRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise status.error_of(error) from None
        return tuple(ModelInfo(model.name, model.revision, model.max_context) for model in response.models)


def _set_guide(
    sampling: generation_pb2.SamplingParams,
    json_schema: str | Mapping[str, Any] | None,
    regex: str | None,
    grammar: str | None,
) -> None:
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InvalidRequest("sampling.guide", " and ".join(named), "at most one of json_schema, regex and grammar")
    for name in named:
        value = given[name]
        with _expressible(f"sampling.guide.{name}", value):
            setattr(sampling.guide, name, value if isinstance(value, str) else json.dumps(value))


@contextmanager
def _expressible(field: str, value: object) -> Iterator[None]:
    """Raises InvalidRequest if the block cannot store `value` in a protobuf field. The gateway refuses other bad values."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(field, value, f"a value that generation.proto can express ({error})") from None
