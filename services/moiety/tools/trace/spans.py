"""Spans and figures as a collector sees them: plain values, read by the waterfall, the demo and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moiety.telemetry.tracing import Value


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span. Ids are lower-case hexadecimal; times are nanoseconds since the epoch, by the sender's clock."""

    trace_id: str
    span_id: str
    parent_id: str  # "" for the root
    name: str
    service: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Value] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()  # (trace_id, span_id) of each
    status: str = "unset"  # unset, ok or error
    message: str = ""  # of an error
    kind: str = "internal"  # names.SpanKind

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


@dataclass(frozen=True, slots=True)
class ReceivedFigure:
    """One value of a metric."""

    name: str  # names.MetricName
    service: str
    value: float
    unit: str
    cumulative: bool  # a counter since the service's start; else a figure of the moment
    attributes: Mapping[str, Value] = field(default_factory=dict)
