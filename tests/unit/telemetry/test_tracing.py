"""Traces from `configure` to a real OTLP endpoint."""

from __future__ import annotations

import threading

import pytest

from moiety.telemetry import (
    NO_SPAN,
    Attribute,
    ResourceAttribute,
    SpanName,
    TraceContext,
    configure,
    parse_traceparent,
)

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00"


def test_two_services_join_one_trace(receiver):
    """A span with a received traceparent is a child of the sender's span; names, times, kinds and values arrive intact."""
    router = configure("moiety-router", {ResourceAttribute.INSTANCE: "router-1"})
    expert = configure("moiety-experts-0")
    request = router.start(SpanName.ENGINE_REQUEST, parent=None, start_ns=1_000)
    hop = router.start(SpanName.HOP, parent=request, attributes={Attribute.LAYER: 3, Attribute.HEDGE: False})
    work = expert.start(SpanName.EXPERT, parent=hop.traceparent, start_ns=5_000, links=[request, SAMPLED, ""])
    work.set(Attribute.QUEUE_MS, 0.25)
    request.end(9_000)  # the parent ends before its children
    work.end(7_000)
    hop.set(Attribute.FINISH_REASONS, ["stop", "length"])
    hop.end()
    router.shutdown()
    expert.shutdown()

    spans = {span.name: span for span in receiver.wait_for(lambda spans: len(spans) == 3)}
    root, middle, leaf = spans["engine.request"], spans["hop"], spans["expert"]
    assert root.trace_id == middle.trace_id == leaf.trace_id
    assert (root.parent_id, middle.parent_id, leaf.parent_id) == ("", root.span_id, middle.span_id)
    assert (root.start_ns, root.end_ns, leaf.start_ns, leaf.end_ns) == (1_000, 9_000, 5_000, 7_000)
    assert (root.service, leaf.service) == ("moiety-router", "moiety-experts-0")
    assert (root.kind, middle.kind, leaf.kind) == ("server", "client", "server")
    assert leaf.links == ((root.trace_id, root.span_id), (TRACE_ID, SPAN_ID))
    assert root.attributes["service.instance.id"] == "router-1"
    assert middle.attributes["moiety.layer"] == 3
    assert middle.attributes["moiety.hedge"] is False
    assert middle.attributes["gen_ai.response.finish_reasons"] == ("stop", "length")
    assert leaf.attributes["moiety.queue_ms"] == 0.25


def test_spans_start_and_end_on_any_thread(receiver):
    """A span's parent is the one passed, whatever the thread or other open spans."""
    tracer = configure("moiety-router")
    step = tracer.start(SpanName.STEP, parent=None)
    with tracer.start(SpanName.QUEUE, parent=None):
        layers = [tracer.start(SpanName.LAYER, parent=step) for _ in range(4)]
    threads = [threading.Thread(target=layer.end) for layer in reversed(layers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    step.end()
    tracer.shutdown()

    spans = receiver.wait_for(lambda spans: len(spans) == 6)
    (root,) = (span for span in spans if span.name == "step")
    assert {span.parent_id for span in spans if span.name == "layer"} == {root.span_id}
    assert {span.parent_id for span in spans if span.name == "queue"} == {""}


def test_a_failure_is_recorded_and_raised(receiver):
    """An exception in a `with` block marks the span with its type and text, and leaves the block."""
    tracer = configure("moiety-router")
    with pytest.raises(ValueError, match="no such expert"), tracer.start(SpanName.HOP, parent=None):
        raise ValueError("no such expert")
    with tracer.start(SpanName.PARK, parent=None) as park:
        park.error("no live replica")
        park.end()  # the later end by the block and the later `set` are ignored
        park.set(Attribute.LAYER, 1)
    tracer.shutdown()

    spans = {span.name: span for span in receiver.wait_for(lambda spans: len(spans) == 2)}
    assert (spans["hop"].status, spans["hop"].message) == ("error", "no such expert")
    assert spans["hop"].attributes["error.type"] == "ValueError"
    assert (spans["park"].status, spans["park"].message) == ("error", "no live replica")


def test_a_declined_trace_costs_and_sends_nothing(receiver, monkeypatch):
    """At ratio 0 a root and its children are NO_SPAN and nothing is sent; a child of a sampled remote parent is sent."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracer = configure("moiety-router")
    root = tracer.start(SpanName.GENERATE, parent=None)
    assert root is NO_SPAN
    assert not root.recording
    assert root.traceparent == ""
    for parent in (root, root.traceparent, UNSAMPLED):
        assert tracer.start(SpanName.STEP, parent=parent) is NO_SPAN
    tracer.start(SpanName.LAYER, parent=SAMPLED).end()
    tracer.shutdown()

    (only,) = receiver.wait_for(len)
    assert (only.name, only.trace_id, only.parent_id) == ("layer", TRACE_ID, SPAN_ID)


def test_half_of_the_traces_means_whole_traces(receiver, monkeypatch):
    """A child is sampled exactly when its root is, also on another service with its own sampler."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    gateway, router = configure("moiety-gateway"), configure("moiety-router")
    kept = 0
    for _ in range(200):
        root = gateway.start(SpanName.GENERATE, parent=None)
        child = router.start(SpanName.ENGINE_REQUEST, parent=root.traceparent)
        assert child.recording == root.recording
        kept += root.recording
        child.end()
        root.end()
    gateway.shutdown()
    router.shutdown()
    assert 60 <= kept <= 140
    assert len(receiver.wait_for(lambda spans: len(spans) >= 2 * kept)) == 2 * kept


def test_a_malformed_parent_starts_a_new_trace(receiver):
    """A malformed traceparent is ignored, as W3C Trace Context says, and the request is traced as a root."""
    tracer = configure("moiety-gateway")
    with tracer.start(SpanName.GENERATE, parent="00-nonsense") as span:
        assert parse_traceparent(span.traceparent) is not None
    tracer.shutdown()
    assert receiver.wait_for(len)[0].parent_id == ""


def test_the_global_provider_is_left_alone(receiver):
    """`configure` does not change the global tracer provider, which may be Ray Serve's."""
    from opentelemetry import trace

    before = trace.get_tracer_provider()
    tracer = configure("moiety-router")
    tracer.start(SpanName.STEP, parent=None).end()
    tracer.shutdown()
    assert trace.get_tracer_provider() is before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SAMPLED, TraceContext(TRACE_ID, SPAN_ID, sampled=True)),
        (UNSAMPLED, TraceContext(TRACE_ID, SPAN_ID, sampled=False)),
        (f"01-{TRACE_ID}-{SPAN_ID}-03-more", TraceContext(TRACE_ID, SPAN_ID, sampled=True)),
        ("", None),
        (SAMPLED.upper(), None),  # hexadecimal is lower-case
        (SAMPLED + "-more", None),  # version 00 ends after the flags
        (SAMPLED + "\n", None),
        ("ff" + SAMPLED[2:], None),  # a forbidden version
        (f"00-{'0' * 32}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
    ],
)
def test_traceparent_is_read_as_w3c_says(text, expected):
    """The known fields of future versions are read; malformed text and zero ids are refused."""
    assert parse_traceparent(text) == expected
