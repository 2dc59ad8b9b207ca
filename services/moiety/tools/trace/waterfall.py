"""Prints one trace as indented text with bars, for readers without a tracing backend."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from moiety.telemetry.names import Attribute, SpanName
from moiety.tools.trace.spans import ReceivedSpan
from moiety.tools.trace.tree import Node, trees

_EIGHTHS = " ▏▎▍▌▋▊▉"
_OUTLIER = 3.0  # the slowest sibling is shown, not summed up, if it took this many times the median of its kind
_DETAILS = (3, 2, 1)  # siblings of one kind that are shown in full, not summed up; the first number that fits is used


@dataclass(frozen=True, slots=True)
class _Line:
    label: str
    service: str
    start_ns: int
    end_ns: int
    took_ms: float | None  # None on a line that sums up several spans


def waterfall(
    spans: Iterable[ReceivedSpan], trace_id: str, *, width: int = 110, max_rows: int = 50, focus: str | None = None
) -> str:
    """Returns the trace as text: a line per span with its service, start and duration in ms, and a bar scaled to the trace.

    Up to 3 siblings of one kind (decode steps, layers, hops) are shown in full, fewer where `max_rows` is small. Of more
    siblings, the text shows the first, the outlier if there is one, and a line that sums up the rest. `focus` is the id of
    a span, such as one step of a long answer: only this span and those below it are shown, with bars scaled to this span.
    The text has at most `max_rows` lines of spans, each of at most `width` columns.
    """
    roots = trees(spans, trace_id)
    if focus is not None:
        roots = [node for root in roots for node in root.walk() if node.span.span_id == focus]
    if not roots:
        return f"trace {trace_id}: no spans"
    everything = [node.span for root in roots for node in root.walk()]
    for shown in _DETAILS:
        rows = [row for root in roots for row in _rows(root, "", "", shown)]
        if len(rows) <= max_rows:
            break
    left_out = len(rows) - max_rows
    if left_out > 0:
        rows = rows[: max_rows - 1]
    lines = [_title(trace_id, everything), *_table(rows, width, _start(everything), _end(everything))]
    if left_out > 0:
        lines.append(f"… {left_out + 1} more lines")
    return "\n".join(lines)


def _rows(node: Node, branch: str, indent: str, shown: int) -> Iterator[_Line]:
    span = node.span
    yield _Line(branch + _label(span), span.service, span.start_ns, span.end_ns, span.duration_ms)
    entries = list(_entries(node.children, shown))
    for position, entry in enumerate(entries, start=1):
        last = position == len(entries)
        stem, below = indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  ")
        if isinstance(entry, Node):
            yield from _rows(entry, stem, below, shown)
        else:
            yield _Line(stem + _summary(entry), "", _start(entry), _end(entry), None)


def _entries(children: Sequence[Node], shown: int) -> Iterator[Node | list[ReceivedSpan]]:
    """Yields the nodes of `children` in order, but sums up each kind of span that has more than `shown` of them.

    Of such a kind it yields the first node, an outlier if there is one, and one list of the other spans. The list takes the
    place of its first span.
    """
    kinds: dict[str, list[Node]] = defaultdict(list)
    for child in children:
        kinds[_kind(child.span)].append(child)
    summed: dict[str, list[ReceivedSpan]] = {}
    for kind, nodes in kinds.items():
        if len(nodes) > shown:
            slowest = max(nodes, key=lambda node: node.span.duration_ms).span
            outlier = slowest.duration_ms > _OUTLIER * median(node.span.duration_ms for node in nodes)
            summed[kind] = [node.span for node in nodes[1:] if not (outlier and node.span is slowest)]
    hidden = {span.span_id for rest in summed.values() for span in rest}
    for child in children:
        if child.span.span_id not in hidden:
            yield child
        elif (rest := summed.pop(_kind(child.span), None)) is not None:
            yield rest


def _kind(span: ReceivedSpan) -> str:
    step_class = span.attributes.get(Attribute.STEP_CLASS)
    return f"{step_class} {span.name}" if step_class is not None else span.name


def _label(span: ReceivedSpan) -> str:
    label, values = _kind(span), span.attributes
    if span.name == SpanName.LAYER and Attribute.LAYER in values:
        label = f"layer {values[Attribute.LAYER]}"
    elif span.name == SpanName.HOP:
        label = f"hop → {values.get(Attribute.REPLICA) or values.get(Attribute.DEPLOYMENT, '?')}"
        label += f", try {attempt + 1}" if isinstance(attempt := values.get(Attribute.ATTEMPT), int) and attempt else ""
        label += ", hedge" if values.get(Attribute.HEDGE) else ""
    return f"{label} ✗ {span.message}".rstrip() if span.status == "error" else label


def _summary(spans: Sequence[ReceivedSpan]) -> str:
    durations = [span.duration_ms for span in spans]
    kind = _kind(spans[0]) + ("s" if len(spans) > 1 and spans[0].name in ("step", "layer", "hop") else "")
    failed = sum(span.status == "error" for span in spans)
    return f"… {len(spans)} more {kind}, {_ms(median(durations))} ms each (p50)" + (f", {failed} ✗" if failed else "")


def _title(trace_id: str, spans: Sequence[ReceivedSpan]) -> str:
    failed = sum(span.status == "error" for span in spans)
    services = len({span.service for span in spans})
    return (
        f"trace {trace_id} · {_ms((_end(spans) - _start(spans)) / 1e6)} ms · {_count(len(spans), 'span')}"
        f" · {_count(services, 'service')}" + (f" · {failed} failed" if failed else "")
    )


def _table(rows: Sequence[_Line], width: int, start_ns: int, end_ns: int) -> Iterator[str]:
    services = max(7, *(len(row.service) for row in rows))
    labels = max(4, min(max(len(row.label) for row in rows), width - services - 32))
    bars = max(8, width - labels - services - 24)
    yield f"{'span':{labels}}  {'service':{services}}  {'at ms':>8}  {'took ms':>8}".rstrip()
    for row in rows:
        label = row.label if len(row.label) <= labels else row.label[: labels - 1] + "…"
        took = "" if row.took_ms is None else _ms(row.took_ms)
        bar = _bar(row, start_ns, max(1, end_ns - start_ns), bars)
        at = _ms((row.start_ns - start_ns) / 1e6)
        yield f"{label:{labels}}  {row.service:{services}}  {at:>8}  {took:>8}  {bar}".rstrip()


def _bar(row: _Line, origin_ns: int, extent_ns: int, cells: int) -> str:
    """Returns the bar of a row, exact to an eighth of a cell; for a row that sums up spans, a light bar of whole cells."""
    first = min(cells - 1, (row.start_ns - origin_ns) * cells // extent_ns)
    eighths = max(1, (row.end_ns - origin_ns) * cells * 8 // extent_ns - first * 8)
    if row.took_ms is None:
        return " " * first + "░" * -(-eighths // 8)
    return " " * first + "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _start(spans: Iterable[ReceivedSpan]) -> int:
    return min(span.start_ns for span in spans)


def _end(spans: Iterable[ReceivedSpan]) -> int:
    return max(span.end_ns for span in spans)


def _ms(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
