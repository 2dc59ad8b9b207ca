"""Records the spans of traced requests in this process, and computes the times of each MoE layer from them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_SPAN, Parent, Span, Value


@dataclass(eq=False)
class RecordedSpan:
    """A span that is kept in this process. It has no trace context to send with calls to experts."""

    name: SpanName
    parent: RecordedSpan | None
    start_ns: int
    attributes: dict[Attribute, Value] = field(default_factory=dict)
    end_ns: int = 0

    recording = True
    traceparent = ""

    def set(self, key: Attribute, value: Value) -> None:
        self.attributes[key] = value

    def error(self, cause: BaseException | str) -> None:
        """Does nothing: a failed request fails the benchmark."""

    def end(self, end_ns: int | None = None) -> None:
        self.end_ns = self.end_ns or end_ns or time.time_ns()

    def __enter__(self) -> RecordedSpan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.end()


class SpanRecorder:
    """A Tracer that records the descendants of spans made by `root`, and no others."""

    def __init__(self) -> None:
        self.spans: list[RecordedSpan] = []

    def root(self) -> RecordedSpan:
        """Returns a new span for a request whose spans are to be recorded."""
        return RecordedSpan(SpanName.ENGINE_REQUEST, None, time.time_ns())

    def start(
        self,
        name: SpanName,
        *,
        parent: Parent,
        attributes: Mapping[Attribute, Value] | None = None,
        start_ns: int | None = None,
        links: Iterable[Span | str] = (),
    ) -> Span:
        if not isinstance(parent, RecordedSpan):
            return NO_SPAN
        span = RecordedSpan(name, parent, start_ns or time.time_ns(), dict(attributes or {}))
        self.spans.append(span)
        return span

    def flush(self, timeout_s: float = 2.0) -> bool:
        return True

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Does nothing: the recorder has no thread or connection."""


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Times of one MoE layer in one step."""

    compute_ms: float  # of the slowest group
    hop_ms: float  # from the first call sent to the last answer, less `compute_ms`
    imbalance: float  # the slowest group's compute over the mean of all groups


def layer_times(spans: Sequence[RecordedSpan], groups: int) -> list[LayerTime]:
    """Returns one LayerTime per MoE layer and decode step. Leaves out layers where no call was answered.

    In the imbalance of a layer, an expert group without an answered call counts as idle.
    """
    calls: dict[RecordedSpan, list[RecordedSpan]] = defaultdict(list)
    for span in spans:
        if span.name is SpanName.HOP and span.parent is not None and Attribute.COMPUTE_MS in span.attributes:
            calls[span.parent].append(span)
    return [_of_layer(hops, groups) for layer, hops in calls.items() if _decodes(layer)]


def _of_layer(hops: Sequence[RecordedSpan], groups: int) -> LayerTime:
    computes = [float(hop.attributes[Attribute.COMPUTE_MS]) for hop in hops]  # type: ignore[arg-type]
    slowest = max(computes)
    took = (max(hop.end_ns for hop in hops) - min(hop.start_ns for hop in hops)) / 1e6
    return LayerTime(slowest, took - slowest, slowest * groups / sum(computes) if slowest else 1.0)


def _decodes(layer: RecordedSpan) -> bool:
    return layer.parent is not None and layer.parent.attributes.get(Attribute.STEP_CLASS) == "decode"
