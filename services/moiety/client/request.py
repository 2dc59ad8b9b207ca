"""What both clients share: how they connect, and their `generate`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, Unpack

from moiety.client.message import request_of
from moiety.client.options import GenerateOptions, Prompt
from moiety.errors import ConfigError, MoietyError
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

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Returns the chunks of a generation as they arrive. Leaving the loop, or closing the iterator, cancels the request.

        `prompt` is a text, token ids, or messages (mappings with role and content), which the checkpoint's chat template
        turns into text. `options.py` lists the options, such as `max_tokens`, `temperature` and `stop`.

        Raises InvalidRequest for an argument that a request cannot express. The iterator raises the gateway's errors
        (errors.py). A request that is refused because a queue is full (ResourceExhausted) is sent again up to `retries`
        times, after the gateway's retry delay and within `timeout_s`.
        """
        return self._stream(request_of(prompt, options), options.get("timeout_s"), options.get("retries") or 0)
