"""Hand-made traces, with times in milliseconds."""

from __future__ import annotations

from moiety.telemetry import Attribute, Value
from moiety.tools.trace.spans import ReceivedSpan

TRACE_ID = "ab" * 16


class Trace:
    """Collects spans; `add` returns a span's id, the parent of its children."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []

    def add(
        self,
        name: str,
        start_ms: float,
        end_ms: float,
        parent: str = "",
        *,
        service: str = "moiety-router",
        error: str | None = None,
        **attributes: Value,
    ) -> str:
        """Adds a span from `start_ms` to `end_ms`; keyword attributes have the names of `Attribute`."""
        span_id = f"{len(self.spans) + 1:016x}"
        self.spans.append(
            ReceivedSpan(
                trace_id=TRACE_ID,
                span_id=span_id,
                parent_id=parent,
                name=name,
                service=service,
                start_ns=round(start_ms * 1e6),
                end_ns=round(end_ms * 1e6),
                attributes={Attribute[key]: value for key, value in attributes.items()},
                status="unset" if error is None else "error",
                message=error or "",
            )
        )
        return span_id


def answer(steps: int = 120, layers: int = 8, slow_step: int | None = None) -> Trace:
    """Returns the trace of a request: a prefill, then decode steps of `layers` layers with two hops each.

    `slow_step` waits 60 ms in its first layer.
    """
    trace, per_layer = Trace(), 0.5
    step_ms = layers * per_layer + 0.1
    total = 2.5 + steps * step_ms + (60 if slow_step is not None else 0)
    root = trace.add("generate", 0, total, service="moiety-gateway")
    request = trace.add("engine.request", 0.4, total - 0.2, root)
    trace.add("queue", 0.5, 1.1, request)
    at = 1.2
    for index in range(steps):
        waits = 60 if index == slow_step else 0
        step = trace.add("step", at, at + step_ms + waits, request, STEP_CLASS="decode" if index else "prefill")
        for layer in range(layers):
            begin = at + layer * per_layer
            end = begin + per_layer + (waits if layer == 0 else 0)
            this = trace.add("layer", begin, end, step, LAYER=layer)
            for group in range(2):
                hop = trace.add("hop", begin + 0.1, begin + 0.45, this, REPLICA=f"experts-{group}-a1")
                name = f"moiety-experts-{group}"
                expert = trace.add("expert", begin + 0.15, begin + 0.4, hop, service=name)
                trace.add("expert.queue", begin + 0.15, begin + 0.2, expert, service=name)
                trace.add("expert.kernel", begin + 0.2, begin + 0.4, expert, service=name)
        at += step_ms + waits
    return trace
