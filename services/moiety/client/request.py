"""What both clients share: their arguments, and a GenerateRequest made of them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from moiety.errors import ConfigError, InvalidRequest, MoietyError
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_TRACER, Tracer
from moiety.v1 import generation_pb2, generation_pb2_grpc
from moiety.wire.channels import CLIENT_CONNECT_S, CLIENT_PINGS, Pings, client_options
from moiety.wire.trace_context import with_traceparent

Stream = TypeVar("Stream")  # of chunks: the kind of iterator that a client returns
Metadata = tuple[tuple[str, str], ...]


class GenerationClient(ABC, Generic[Stream]):
    """The base of `Client` and `SyncClient`: everything but the exchange with the gateway."""

    def __init__(
        self,
        address: str,
        tracer: Tracer = NO_TRACER,
        *,
        ping_every_s: float = CLIENT_PINGS.every_s,
        ping_timeout_s: float = CLIENT_PINGS.timeout_s,
        connect_timeout_s: float = CLIENT_CONNECT_S,
    ):
        """Connects on first use. A request fails with PeerLost if that takes longer than `connect_timeout_s`.

        While requests are open and nothing has arrived for `ping_every_s`, the client pings. If no answer comes within
        `ping_timeout_s`, the gateway is lost, and the requests end with PeerLost. A gateway whose process ends is noticed at
        once without that; pings find one that is stopped or cut off.

        The defaults suit any server or proxy. One with gRPC's default settings allows a ping every 5 minutes, and ends the
        connection of a client that pings more often while no tokens come. To notice a loss sooner, give requests a
        `timeout_s`. Where nothing but Moiety's gateway answers, which allows all pings, and the network is fast,
        `ping_every_s=0.5, ping_timeout_s=1, connect_timeout_s=1` notices a loss within 1.5 s. A ping waits behind the data
        sent before it: `ping_timeout_s` must be longer than sending a prompt takes. `ping_every_s=math.inf` sends none.

        Raises ConfigError for a time that is not positive.
        """
        times = {"ping_every_s": ping_every_s, "ping_timeout_s": ping_timeout_s, "connect_timeout_s": connect_timeout_s}
        for name, seconds in times.items():
            if not seconds > 0:
                raise ConfigError(name, seconds, "more than 0 seconds")
        self.address = address
        self._tracer = tracer
        self._channel = self._open(client_options(Pings(ping_every_s, ping_timeout_s), connect_timeout_s))
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    @abstractmethod
    def _open(self, options: Sequence[tuple[str, int]]) -> Any:
        """Returns a channel to `address`."""

    @abstractmethod
    def _stream(self, request: generation_pb2.GenerateRequest, timeout_s: float | None, retries: int) -> Stream:
        """Returns the chunks of a request."""

    @contextmanager
    def _traced(self) -> Iterator[Metadata]:
        """A span around a request. Yields the metadata that carries its trace context."""
        span = self._tracer.start(
            SpanName.CLIENT_GENERATE, parent=None, attributes={Attribute.SERVER_ADDRESS: self.address}
        )
        try:
            yield with_traceparent(span.traceparent)
        except MoietyError as error:
            span.error(error)
            raise
        finally:
            span.end()

    def generate(
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
    ) -> Stream:
        """Returns the chunks of a generation as they arrive. Leaving the loop, or closing the iterator, cancels the request.

        Raises InvalidRequest for an argument that a request cannot express. The iterator raises the gateway's errors
        (errors.py).

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
        return self._stream(request, timeout_s, retries)


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
