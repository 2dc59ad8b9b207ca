"""Traces of every hop and metrics of every service, behind an interface that costs nothing while export is off."""

from moiety.telemetry.export import configure, configure_metrics
from moiety.telemetry.metrics import NO_METER, Meter
from moiety.telemetry.names import Attribute, MetricName, ResourceAttribute, SpanName
from moiety.telemetry.tracing import (
    NO_SPAN,
    NO_TRACER,
    Parent,
    Span,
    TraceContext,
    Tracer,
    Value,
    parse_traceparent,
)

__all__ = [
    "NO_METER",
    "NO_SPAN",
    "NO_TRACER",
    "Attribute",
    "Meter",
    "MetricName",
    "Parent",
    "ResourceAttribute",
    "Span",
    "SpanName",
    "TraceContext",
    "Tracer",
    "Value",
    "configure",
    "configure_metrics",
    "parse_traceparent",
]
