"""The tracer the rest of the code knows, its no-op twin, and `configure`, which picks one of the two.

Spans are started and ended on any thread, in any order, with explicit times. So a parent is always passed, never looked
up from a context; and no tracer is ever global, so that several services can share a process.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeAlias

from moiety.telemetry.export_enabled import export_enabled
from moiety.telemetry.names import Attribute, SpanName

Value: TypeAlias = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

_logger = logging.getLogger("moiety.telemetry")
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class Span(Protocol):
    """A stretch of time with a name. As a context manager it records the exception that leaves it, and ends."""

    @property
    def recording(self) -> bool:
        """False where nothing is kept: skip work that only feeds attributes."""
        ...

    @property
    def traceparent(self) -> str:
        """W3C trace context to send to the next service; "" when not sampled. Still valid after the end."""
        ...

    def set(self, key: Attribute, value: Value) -> None: ...

    def error(self, cause: BaseException | str) -> None:
        """Marks the span as failed."""
        ...

    def end(self, end_ns: int | None = None) -> None:
        """Ends at `end_ns` (nanoseconds since the epoch) or now. A second end is ignored."""
        ...

    def __enter__(self) -> Span: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


Parent: TypeAlias = Span | str | None


class Tracer(Protocol):
    """Makes the spans of one service. All methods may be called from any thread."""

    def start(
        self,
        name: SpanName,
        *,
        parent: Parent,
        attributes: Mapping[Attribute, Value] | None = None,
        start_ns: int | None = None,
        links: Iterable[Span | str] = (),
    ) -> Span:
        """A started span.

        `parent` is a span, or the traceparent of one elsewhere. None starts a trace, which the sampler may decline, and
        so does a malformed traceparent (W3C Trace Context, §4.3); "" and unsampled parents give NO_SPAN at once.
        `start_ns` is in nanoseconds since the epoch, default now. `links` are other spans this one worked for.
        """
        ...

    def flush(self, timeout_s: float = 2.0) -> bool:
        """Exports what has ended; False where that did not work within `timeout_s`. Never raises."""
        ...

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Flushes and stops within `timeout_s` and a moment; what could not be sent is dropped. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A parsed traceparent; the ids are lower-case hexadecimal, as in ReceivedSpan."""

    trace_id: str
    span_id: str
    sampled: bool


def parse_traceparent(text: str) -> TraceContext | None:
    """What `text` says (W3C Trace Context, §3.2), or None where it is malformed."""
    match = _TRACEPARENT.fullmatch(text)
    if match is None or (match[1] == "00" and match[5] is not None):
        return None
    return TraceContext(match[2], match[3], sampled=bool(int(match[4], 16) & 1))


class _NoSpan:
    __slots__ = ()

    recording = False
    traceparent = ""

    def set(self, key: Attribute, value: Value) -> None:
        """Keeps nothing."""

    def error(self, cause: BaseException | str) -> None:
        """Keeps nothing."""

    def end(self, end_ns: int | None = None) -> None:
        """Keeps nothing."""

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets exceptions pass."""


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
        """Nothing to stop."""


NO_SPAN: Span = _NoSpan()
NO_TRACER: Tracer = _NoTracer()


def configure(service: str, attributes: Mapping[str, str] | None = None, *, endpoint: str | None = None) -> Tracer:
    """The tracer of one service: a real one if the OTEL_* variables ask for OTLP, else NO_TRACER.

    `service` is the service.name; `attributes` (names.ResourceAttribute) join it on every span. `endpoint`
    (http://host:port) asks for OTLP as OTEL_EXPORTER_OTLP_TRACES_ENDPOINT does, and wins over it. Telemetry that cannot
    be set up is reported once in the log and left off: it never keeps a service from starting.
    """
    if not export_enabled("traces", endpoint):
        return NO_TRACER
    try:
        from moiety.telemetry.otel import OtelTracer

        return OtelTracer(service, dict(attributes or {}), endpoint)
    except Exception as error:
        _logger.warning("traces are off: %s: %s", type(error).__name__, error)
        return NO_TRACER
