"""The `Tracer` interface that the rest of the code uses, and its no-op twin.

Spans start and end on any thread, in any order, with explicit times. So callers pass the parent; it is never looked up
from a context. No tracer is global, so that several services can share a process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeAlias

from moiety.telemetry.names import Attribute, SpanName

Value: TypeAlias = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Span(Protocol):
    """A named stretch of time. As a context manager it records the exception that leaves the block, and ends."""

    @property
    def recording(self) -> bool:
        """Whether the span keeps attributes. If not, callers can skip the work of computing them."""
        ...

    @property
    def traceparent(self) -> str:
        """The W3C trace context to send to the next service; "" when not sampled. Still valid after the end."""
        ...

    def set(self, key: Attribute, value: Value) -> None:
        """Sets an attribute."""
        ...

    def error(self, cause: BaseException | str) -> None:
        """Marks the span as failed."""
        ...

    def end(self, end_ns: int | None = None) -> None:
        """Ends the span at `end_ns` (nanoseconds since the epoch) or now. A second call is ignored."""
        ...

    def __enter__(self) -> Span: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


Parent: TypeAlias = Span | str | None


class Tracer(Protocol):
    """Creates the spans of one service. All methods may be called from any thread."""

    def start(
        self,
        name: SpanName,
        *,
        parent: Parent,
        attributes: Mapping[Attribute, Value] | None = None,
        start_ns: int | None = None,
        links: Iterable[Span | str] = (),
    ) -> Span:
        """Returns a started span, or NO_SPAN if it is not sampled.

        `parent` is a span, or the traceparent of a span in another process. None or a malformed traceparent (W3C Trace Context,
        §4.3) starts a new trace, which the sampler may decline. "" or an unsampled parent gives NO_SPAN. `start_ns` is in
        nanoseconds since the epoch, default now. `links` are related spans other than the parent.
        """
        ...

    def flush(self, timeout_s: float = 2.0) -> bool:
        """Exports all ended spans; returns False where that fails or takes longer than `timeout_s`. Never raises."""
        ...

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Exports ended spans and stops. Drops spans that are not sent soon after `timeout_s` seconds. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A parsed traceparent. The ids are lower-case hexadecimal, as in `ReceivedSpan` (tools/trace), so they compare equal."""

    trace_id: str
    span_id: str
    sampled: bool


def parse_traceparent(text: str) -> TraceContext | None:
    """Parses a traceparent (W3C Trace Context, §3.2); returns None where it is malformed."""
    match = _TRACEPARENT.fullmatch(text)
    if match is None or (match[1] == "00" and match[5] is not None):
        return None
    return TraceContext(match[2], match[3], sampled=bool(int(match[4], 16) & 1))


class _NoSpan:
    __slots__ = ()

    recording = False
    traceparent = ""

    def set(self, key: Attribute, value: Value) -> None:
        """Does nothing."""

    def error(self, cause: BaseException | str) -> None:
        """Does nothing."""

    def end(self, end_ns: int | None = None) -> None:
        """Does nothing."""

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets exceptions propagate."""


class _NoTracer:
    __slots__ = ()

    def start(
        self,
        name: SpanName,
        *,
        parent: Parent,
        attributes: Mapping[Attribute, Value] | None = None,
        start_ns: int | None = None,
        links: Iterable[Span | str] = (),
    ) -> Span:
        return NO_SPAN

    def flush(self, timeout_s: float = 2.0) -> bool:
        return True

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Does nothing."""


NO_SPAN: Span = _NoSpan()
NO_TRACER: Tracer = _NoTracer()
