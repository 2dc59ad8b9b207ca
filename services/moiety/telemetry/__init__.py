"""Traces of every hop, behind an interface that costs nothing where nobody asked for them."""

from moiety.telemetry.names import Attribute, ResourceAttribute, SpanName
from moiety.telemetry.tracing import (
    NO_SPAN,
    NO_TRACER,
    Parent,
    Span,
    TraceContext,
    Tracer,
    Value,
    configure,
    parse_traceparent,
)

__all__ = [
    "NO_SPAN",
    "NO_TRACER",
    "Attribute",
    "Parent",
    "ResourceAttribute",
    "Span",
    "SpanName",
    "TraceContext",
    "Tracer",
    "Value",
    "configure",
    "parse_traceparent",
]
