"""`Tracer` and `Span` on the OpenTelemetry SDK: a provider, batch processor and exporter for each service."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from moiety.telemetry.names import Attribute, SpanKind, SpanName, kind_of
from moiety.telemetry.quiet_export import OutageLog, finishes_within
from moiety.telemetry.tracing import NO_SPAN, Parent, Span, Value, parse_traceparent

_KINDS = {
    SpanKind.CLIENT: trace.SpanKind.CLIENT,
    SpanKind.SERVER: trace.SpanKind.SERVER,
    SpanKind.INTERNAL: trace.SpanKind.INTERNAL,
}


class OtelSpan:
    """A sampled span, on the OpenTelemetry SDK; `Tracer.start` returns NO_SPAN for a span that is not sampled."""

    __slots__ = ("span",)

    def __init__(self, span: trace.Span) -> None:
        self.span = span

    @property
    def recording(self) -> bool:
        return self.span.is_recording()

    @property
    def traceparent(self) -> str:
        context = self.span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 0xFF:02x}"

    def set(self, key: Attribute, value: Value) -> None:
        if self.span.is_recording():
            self.span.set_attribute(key, value)

    def error(self, cause: BaseException | str) -> None:
        if not self.span.is_recording():
            return
        if isinstance(cause, BaseException):
            self.span.set_attribute(Attribute.ERROR_TYPE, type(cause).__qualname__)
        self.span.set_status(trace.StatusCode.ERROR, str(cause))

    def end(self, end_ns: int | None = None) -> None:
        if self.span.is_recording():
            self.span.end(end_ns)

    def __enter__(self) -> Span:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.error(error)
        self.end()


class OtelTracer:
    """Creates the spans of one service. A thread of the SDK's batch processor exports them over OTLP/gRPC."""

    def __init__(self, service: str, attributes: Mapping[str, str], endpoint: str | None) -> None:
        self._exporter = _QuietExporter(endpoint)
        self._processor = BatchSpanProcessor(self._exporter)
        # Not the global provider: Ray Serve may have set that, and one process may run several services.
        provider = TracerProvider(
            resource=Resource.create({**attributes, "service.name": service}), shutdown_on_exit=False
        )
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("moiety")

    def start(
        self,
        name: SpanName,
        *,
        parent: Parent,
        attributes: Mapping[Attribute, Value] | None = None,
        start_ns: int | None = None,
        links: Iterable[Span | str] = (),
    ) -> Span:
        context = _context(parent)
        if context is None:
            return NO_SPAN
        span = self._tracer.start_span(
            name.value,
            context,
            _KINDS[kind_of(name)],
            {key.value: value for key, value in attributes.items()} if attributes else None,
            [trace.Link(linked) for link in links if (linked := _span_context(link)) is not None],
            start_ns,
        )
        return OtelSpan(span) if span.is_recording() else NO_SPAN

    def flush(self, timeout_s: float = 2.0) -> bool:
        # The SDK's force_flush ignores its timeout.
        return finishes_within(timeout_s, self._processor.force_flush) and not self._exporter.outages.failing

    def shutdown(self, timeout_s: float = 2.0) -> None:
        self._exporter.outages.drain(timeout_s, self._processor.shutdown)


class _QuietExporter(OTLPSpanExporter):
    """The SDK's OTLP exporter, but it logs each outage once."""

    def __init__(self, endpoint: str | None) -> None:
        super().__init__(endpoint=endpoint)
        self.outages = OutageLog("spans", super().shutdown)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        send = partial(super().export, spans)
        return self.outages.export(send, SpanExportResult.SUCCESS, SpanExportResult.FAILURE)

    def shutdown(self, timeout_millis: float = 30_000, **_options: Any) -> None:
        self.outages.close()


def _context(parent: Parent) -> Context | None:
    """Returns the context in which a child of `parent` starts; None where the parent is not sampled."""
    if isinstance(parent, OtelSpan):
        return trace.set_span_in_context(parent.span, Context())
    if parent is None:
        return Context()
    if not isinstance(parent, str) or not parent:
        return None
    if parse_traceparent(parent) is None:
        return Context()
    remote = _span_context(parent)
    return trace.set_span_in_context(trace.NonRecordingSpan(remote), Context()) if remote is not None else None


def _span_context(span: Span | str) -> trace.SpanContext | None:
    if isinstance(span, OtelSpan):
        return span.span.get_span_context()
    parsed = parse_traceparent(span) if isinstance(span, str) else None
    if parsed is None or not parsed.sampled:
        return None
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
    return trace.SpanContext(int(parsed.trace_id, 16), int(parsed.span_id, 16), is_remote=True, trace_flags=flags)
