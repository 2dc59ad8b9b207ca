"""The Python client of moiety.v1.Generation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

import grpc

from moiety.client.retry import persistent
from moiety.core import FinishReason
from moiety.errors import InvalidRequest, MoietyError
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_TRACER, Tracer
from moiety.wire import finish, generation_pb2, generation_pb2_grpc, status
from moiety.wire.channels import channel
from moiety.wire.metadata import with_traceparent


@dataclass(frozen=True, slots=True)
class Chunk:
    """One message of a stream."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0  # on the last chunk
    completion_tokens: int = 0  # on the last chunk
    cached_tokens: int = 0  # of the prompt, found in the prefix cache; on the last chunk
    request_id: str = ""  # on the first chunk
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a gateway serves."""

    name: str
    revision: str
    max_context: int


class Client:
    """Streams generations from a gateway. An async context manager; one channel, any number of streams."""

    def __init__(self, address: str, tracer: Tracer = NO_TRACER):
        self.address = address
        self._tracer = tracer
        self._channel = channel(address)
        self._stub = generation_pb2_grpc.GenerationStub(self._channel)

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
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: bool = False,
        request_id: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
        tenant: str = "",
        retries: int = 0,
    ) -> AsyncIterator[Chunk]:
        """Chunks as they come. Leaving the loop cancels the request. Raises the error the gateway told (errors.py).

        A refusal for want of room (ResourceExhausted) is tried again up to `retries` times, after the wait that the
        gateway hints at and within `timeout_s`. Lower `priority` runs first; `tenant` is whose share of a full system
        the request uses.
        """
        fields = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        sampling = generation_pb2.SamplingParams(ignore_eos=ignore_eos, logprobs=logprobs)
        for name, value in fields.items():
            if value is not None:
                _set(sampling, name, value)
        request = generation_pb2.GenerateRequest(model=model, sampling=sampling, request_id=request_id, tenant=tenant)
        _set(request, "priority", priority)
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
            async with aclosing(persistent(call, retries, timeout_s)) as responses:
                async for response in responses:
                    yield Chunk(
                        text=response.text,
                        token_ids=tuple(response.token_ids),
                        finish_reason=finish.FROM_WIRE[response.finish_reason],
                        prompt_tokens=response.usage.prompt_tokens,
                        completion_tokens=response.usage.completion_tokens,
                        cached_tokens=response.usage.cached_tokens,
                        request_id=response.request_id,
                        logprobs=tuple(response.logprobs),
                    )
        except MoietyError as error:
            span.error(error)
            raise
        finally:
            span.end()

    async def models(self, timeout_s: float = 10.0) -> tuple[ModelInfo, ...]:
        """What the gateway serves. Raises Unavailable while no router is ready."""
        try:
            told = await self._stub.ListModels(generation_pb2.ListModelsRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise status.error_of(error) from None
        return tuple(ModelInfo(model.name, model.revision, model.max_context) for model in told.models)


def _set(message: generation_pb2.SamplingParams | generation_pb2.GenerateRequest, name: str, value: float) -> None:
    """Sets a field; what its type on the wire cannot even express is refused here, as the gateway refuses the rest."""
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        field = f"sampling.{name}" if isinstance(message, generation_pb2.SamplingParams) else name
        raise InvalidRequest(field, value, f"a value that generation.proto can express ({error})") from None
