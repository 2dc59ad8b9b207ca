"""A trace as a tree, and how much of a span's time the spans below it account for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moiety.telemetry.names import SpanName
from moiety.tools.trace.spans import ReceivedSpan


@dataclass(frozen=True, slots=True)
class Node:
    """A span with the spans below it, in order of their start."""

    span: ReceivedSpan
    children: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def trees(spans: Iterable[ReceivedSpan], trace_id: str) -> list[Node]:
    """The roots of one trace: spans without a parent, and those whose parent has not been received."""
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
    """The fraction, 0 to 1, of the time of all spans named `of` that their children account for.

    Children that overlap count once, and only within their parent. With `leaves` only spans that have nothing below them
    count: the stricter reading, in which a layer with an unexplained hole does not explain it. 0 where there is no such span.
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
    """Nanoseconds of `within` during which at least one of `spans` ran."""
    covered, reached = 0, within.start_ns
    for span in sorted(spans, key=lambda span: span.start_ns):
        start, end = max(span.start_ns, reached), min(span.end_ns, within.end_ns)
        if end > start:
            covered += end - start
            reached = end
    return covered
