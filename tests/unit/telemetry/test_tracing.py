"""Traces from `configure` to a real OTLP endpoint, and nothing at all where nobody asked for them."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from moiety.telemetry import (
    NO_SPAN,
    NO_TRACER,
    Attribute,
    ResourceAttribute,
    SpanName,
    TraceContext,
    configure,
    parse_traceparent,
)
from moiety.tools.trace.receiver import TraceReceiver

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00"


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch):
    """The variables of the person who runs the tests play no part."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def receiver(monkeypatch):
    """A collector that the environment points at."""
    with TraceReceiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        yield collector


@pytest.fixture
def dead_endpoint():
    """An address where nothing listens: the port stays bound, so that nobody else can take it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_two_services_join_one_trace(receiver):
    """A span made from a received traceparent hangs under the sender's, with names, times, kinds and values intact."""
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
    """A parent is what was passed, whichever thread or open span is around."""
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


def test_a_failure_is_recorded_and_passes_on(receiver):
    """A `with` block's exception marks the span with its type and text, and leaves the block."""
    tracer = configure("moiety-router")
    with pytest.raises(ValueError, match="no such expert"), tracer.start(SpanName.HOP, parent=None):
        raise ValueError("no such expert")
    with tracer.start(SpanName.PARK, parent=None) as park:
        park.error("no live replica")
        park.end()  # the block ends it again, and sets are too late: both ignored
        park.set(Attribute.LAYER, 1)
    tracer.shutdown()

    spans = {span.name: span for span in receiver.wait_for(lambda spans: len(spans) == 2)}
    assert (spans["hop"].status, spans["hop"].message) == ("error", "no such expert")
    assert spans["hop"].attributes["error.type"] == "ValueError"
    assert (spans["park"].status, spans["park"].message) == ("error", "no live replica")


def test_a_declined_trace_costs_and_sends_nothing(receiver, monkeypatch):
    """At ratio 0 a root is NO_SPAN, so are its children, and nothing arrives; a sampled remote parent is honoured."""
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
    """A child follows its root's fate, also on another service with a sampler of its own."""
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
    """W3C Trace Context: what cannot be read is ignored, and the request is still traced."""
    tracer = configure("moiety-gateway")
    with tracer.start(SpanName.GENERATE, parent="00-nonsense") as span:
        assert parse_traceparent(span.traceparent) is not None
    tracer.shutdown()
    assert receiver.wait_for(len)[0].parent_id == ""


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nobody_asked(variables, monkeypatch):
    """Without an endpoint, or with telemetry switched off, the tracer is the no-op one."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracer = configure("moiety-router")
    assert tracer is NO_TRACER
    with tracer.start(SpanName.STEP, parent=None) as span:
        assert span is NO_SPAN
        span.set(Attribute.LAYER, 1)
        span.error("ignored")
    assert tracer.flush()
    tracer.shutdown()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli"),
    ],
)
def test_what_cannot_be_set_up_is_said_and_left_off(variable, value, monkeypatch, caplog):
    """A setting that this build cannot honour costs one warning that names it, never the service."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.WARNING):
        assert configure("moiety-router") is NO_TRACER
    (record,) = caplog.records
    assert value in record.getMessage()


def test_the_global_provider_is_left_alone(receiver):
    """Ray Serve may set its own; ours is never it."""
    from opentelemetry import trace

    before = trace.get_tracer_provider()
    tracer = configure("moiety-router")
    tracer.start(SpanName.STEP, parent=None).end()
    tracer.shutdown()
    assert trace.get_tracer_provider() is before


def test_no_collector_is_quiet_and_bounded(dead_endpoint, caplog):
    """With nothing at the endpoint: one warning, no stack trace, flush says no, and shutdown comes back in time."""
    tracer = configure("moiety-router", endpoint=dead_endpoint)
    tracer.start(SpanName.STEP, parent=None).end()
    began = time.monotonic()
    assert not tracer.flush(timeout_s=0.5)
    tracer.start(SpanName.STEP, parent=None).end()
    tracer.shutdown(timeout_s=1.0)
    assert time.monotonic() - began < 2.5
    assert [record.levelname for record in caplog.records] == ["WARNING"], caplog.text
    assert caplog.records[0].exc_info is None


def test_a_collector_that_hangs_is_quiet_and_bounded(caplog):
    """One that accepts and never answers holds shutdown up for its timeout, not for the exporter's ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer = configure("moiety-router", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracer.start(SpanName.STEP, parent=None).end()
        began = time.monotonic()
        tracer.shutdown(timeout_s=0.5)
        assert time.monotonic() - began < 2.0
    assert not [record for record in caplog.records if record.exc_info]


def test_a_process_without_collector_exits_cleanly(dead_endpoint):
    """The whole life of a laptop service: at most the one warning on stderr."""
    program = (
        "from moiety.telemetry import SpanName, configure\n"
        "tracer = configure('moiety-router')\n"
        "tracer.start(SpanName.STEP, parent=None).end()\n"
        "tracer.shutdown(1.0)\n"
    )
    done = _python(program, OTEL_EXPORTER_OTLP_ENDPOINT=dead_endpoint)
    assert done.returncode == 0
    assert done.stderr.count("\n") <= 1
    assert "Traceback" not in done.stderr


def test_opentelemetry_is_loaded_only_when_asked_for():
    """Importing telemetry and configuring it without an endpoint loads neither OpenTelemetry nor gRPC."""
    program = (
        "import sys, moiety.telemetry as telemetry, moiety.tools.trace.waterfall\n"
        "telemetry.configure('moiety-router')\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('opentelemetry', 'grpc')])\n"
    )
    assert _python(program).stdout.strip() == "[]"


def test_without_the_package_traces_are_off():
    """Where OpenTelemetry is not installed, asking for traces costs one warning that says what to install."""
    program = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'opentelemetry' else find(name, *rest)\n"
        "import moiety.telemetry as telemetry\n"
        "print(telemetry.configure('moiety-router') is telemetry.NO_TRACER)\n"
    )
    done = _python(program, OTEL_TRACES_EXPORTER="otlp")
    assert done.stdout.strip() == "True"
    assert "pip install 'moiety[serve]'" in done.stderr


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
        ("ff" + SAMPLED[2:], None),  # a version that never is
        (f"00-{'0' * 32}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
    ],
)
def test_traceparent_is_read_as_w3c_says(text, expected):
    """Future versions are read as far as they are known; malformed text and zero ids are refused."""
    assert parse_traceparent(text) == expected


def _python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
