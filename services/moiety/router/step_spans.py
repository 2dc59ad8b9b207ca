"""The spans of a step: one in the trace of each request that takes part."""

from __future__ import annotations

from moiety.router.sequence.step_plan import StepPlan
from moiety.telemetry.names import Attribute, SpanName
from moiety.telemetry.tracing import NO_SPAN, Span, Tracer


def step_spans(tracer: Tracer, plan: StepPlan) -> tuple[Span, list[Span]]:
    """Starts the step's span in the first traced request's trace, and a span linked to it in each other request's trace."""
    traced = [item.sequence.span for item in plan.scheduled if item.sequence.span.recording]
    if not traced:
        return NO_SPAN, []
    attributes: dict[Attribute, str | int] = {
        Attribute.STEP_CLASS: plan.call_class.value,
        Attribute.STEP_SEQUENCES: len(plan.scheduled),
        Attribute.STEP_TOKENS: plan.work,
    }
    span = tracer.start(SpanName.STEP, parent=traced[0], attributes=attributes)
    return span, [
        tracer.start(SpanName.STEP, parent=request_span, attributes=attributes, links=(span,))
        for request_span in traced[1:]
    ]
