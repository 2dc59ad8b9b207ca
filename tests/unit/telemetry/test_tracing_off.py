"""Tracing that is off, cannot be set up, or has no collector: quiet, bounded in time, and never fatal."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time

import pytest

from moiety.telemetry import NO_SPAN, NO_TRACER, Attribute, SpanName, configure


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_an_endpoint_tracing_is_off(variables, monkeypatch):
    """Without an endpoint, or with telemetry switched off, `configure` returns the no-op tracer."""
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
def test_an_unsupported_setting_is_logged_and_tracing_stays_off(variable, value, monkeypatch, caplog):
    """A setting that is not supported costs one warning that names it, and `configure` does not raise."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.WARNING):
        assert configure("moiety-router") is NO_TRACER
    (record,) = caplog.records
    assert value in record.getMessage()


def test_no_collector_is_quiet_and_bounded(dead_endpoint, caplog):
    """Without a collector there is one warning and no stack trace, flush returns False, and shutdown ends in time."""
    tracer = configure("moiety-router", endpoint=dead_endpoint)
    tracer.start(SpanName.STEP, parent=None).end()
    began = time.monotonic()
    assert not tracer.flush(timeout_s=0.2)
    tracer.start(SpanName.STEP, parent=None).end()
    tracer.shutdown(timeout_s=0.2)
    assert time.monotonic() - began < 5.0
    assert [record.levelname for record in caplog.records] == ["WARNING"], caplog.text
    assert caplog.records[0].exc_info is None


def test_each_of_two_exporters_reports_its_outage(dead_endpoint, caplog):
    """Two tracers without a collector, one right after the other, give a warning each."""
    tracers = [configure(f"moiety-{name}", endpoint=dead_endpoint) for name in ("router", "gateway")]
    for tracer in tracers:
        tracer.start(SpanName.STEP, parent=None).end()
        assert not tracer.flush(timeout_s=0.2)
    for tracer in tracers:
        tracer.shutdown(timeout_s=0.2)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2, caplog.text


def test_a_collector_that_hangs_is_quiet_and_bounded(caplog):
    """A collector that accepts and does not answer delays shutdown by its timeout, not by the exporter's ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracer = configure("moiety-router", endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracer.start(SpanName.STEP, parent=None).end()
        began = time.monotonic()
        tracer.shutdown(timeout_s=0.2)
        assert time.monotonic() - began < 5.0
    assert not [record for record in caplog.records if record.exc_info]


def test_a_process_without_collector_exits_cleanly(dead_endpoint):
    """A process without a collector starts, traces and exits with at most one line on stderr."""
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
