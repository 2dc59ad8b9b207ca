"""Spans and metric values as a collector receives them, for the waterfall, the demo and tests to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moiety.telemetry.tracing import Value


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span. Ids are lower-case hexadecimal. Times are nanoseconds since the epoch on the sender's clock."""

    trace_id: str
    span_id: str
    parent_id: str  # "" for the root
    name: str
    service: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Value] = field(default_factory=dict)
    links: tuple[tuple[str, str], ...] = ()  # (trace_id, span_id)
    status: str = "unset"  # unset, ok or error
    message: str = ""  # the error's text, if status is error
    kind: str = "internal"  # names.SpanKind

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


@dataclass(frozen=True, slots=True)
class ReceivedMetric:
    """One value of a metric, as one service sent it."""

    name: str  # names.MetricName
    service: str
    value: float
    unit: str
    cumulative: bool  # True: a counter since the service's start; False: a gauge
    attributes: Mapping[str, Value] = field(default_factory=dict)
