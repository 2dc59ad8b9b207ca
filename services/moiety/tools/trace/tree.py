"""Builds the tree of a trace's spans, and measures how much of a span's time its descendants account for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moiety.telemetry.names import SpanName
from moiety.tools.trace.spans import ReceivedSpan


@dataclass(frozen=True, slots=True)
class Node:
    """A span and its child spans, in order of start."""

    span: ReceivedSpan
    children: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """Yields this node and all nodes below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def trees(spans: Iterable[ReceivedSpan], trace_id: str) -> list[Node]:
    """Returns the roots of one trace: spans that have no parent, or whose parent has not been received."""
    nodes = {span.span_id: Node(span) for span in spans if span.trace_id == trace_id}
    below: dict[str, list[Node]] = defaultdict(list)
    for node in sorted(nodes.values(), key=lambda node: (node.span.start_ns, -node.span.end_ns)):
        below[node.span.parent_id if node.span.parent_id in nodes else ""].append(node)
    for span_id, node in nodes.items():
        node.children.extend(below[span_id])
    return below[""]


def coverage(
    spans: Iterable[ReceivedSpan], trace_id: str, *, of: SpanName = SpanName.STEP, leaves: bool = False
) -> float:
    """Returns the fraction, 0 to 1, of the time of a trace's spans named `of` that their child spans cover.

    Time that several children cover counts once. Time outside the parent does not count. With `leaves`, only descendants
    without children count. This is stricter: gaps between a child's own children are then not covered. Returns 0 if no
    span is named `of`.
    """
    total = explained = 0
    for node in (node for root in trees(spans, trace_id) for node in root.walk() if node.span.name == of):
        total += node.span.end_ns - node.span.start_ns
        explained += _union(_below(node, leaves), node.span)
    return explained / total if total else 0.0


def _below(node: Node, leaves: bool) -> Iterator[ReceivedSpan]:
    for child in node.children:
        if leaves and child.children:
            yield from _below(child, leaves)
        else:
            yield child.span


def _union(spans: Iterable[ReceivedSpan], within: ReceivedSpan) -> int:
    """Returns the nanoseconds of `within` during which at least one of `spans` ran."""
    covered, reached = 0, within.start_ns
    for span in sorted(spans, key=lambda span: span.start_ns):
        start, end = max(span.start_ns, reached), min(span.end_ns, within.end_ns)
        if end > start:
            covered += end - start
            reached = end
    return covered
