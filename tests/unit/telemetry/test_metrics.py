"""Metrics from `configure_metrics` to a real OTLP endpoint, and none while export is off."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time

import pytest

from moiety.telemetry import NO_METER, Attribute, MetricName, ResourceAttribute, configure_metrics
from moiety.tools.trace.receiver import TraceReceiver


def test_metrics_arrive_with_kind_unit_and_attributes(receiver: TraceReceiver) -> None:
    """Shutdown exports every metric; one that has no value yet, or whose `read` raises, does not stop the others."""
    meter = configure_metrics("moiety-router", {ResourceAttribute.INSTANCE: "router-1"})
    meter.observe(MetricName.BUSY, lambda: 0.25)
    meter.observe(MetricName.ROUTED_ROWS, lambda: 1 << 40)
    meter.observe(MetricName.COST_ERROR, lambda: None)
    meter.observe(MetricName.QUEUE_WAIT, lambda: 1 // 0)
    for deployment, target in (("experts-0", 1), ("experts-1", 2), ("experts-1", 3)):
        meter.observe(MetricName.TARGET, lambda target=target: target, {Attribute.DEPLOYMENT: deployment})
    meter.shutdown()
    figures = {(figure.name, figure.attributes.get("moiety.deployment")): figure for figure in receiver.metrics()}
    assert {key: (figure.value, figure.unit, figure.cumulative) for key, figure in figures.items()} == {
        ("moiety.busy", None): (0.25, "1", False),
        ("moiety.routed_rows", None): (1 << 40, "{row}", True),
        ("moiety.scaling.target", "experts-0"): (1, "{replica}", False),
        ("moiety.scaling.target", "experts-1"): (3, "{replica}", False),
    }
    assert {figure.service for figure in figures.values()} == {"moiety-router"}
    assert {figure.attributes["service.instance.id"] for figure in figures.values()} == {"router-1"}


def test_metrics_are_exported_periodically(receiver: TraceReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A growing counter is exported again in each interval."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    reads = iter(range(10_000))
    meter = configure_metrics("moiety-router")
    meter.observe(MetricName.ROUTED_ROWS, lambda: next(reads))
    until = time.monotonic() + 10.0
    while not any(figure.value >= 2 for figure in receiver.metrics()):
        assert time.monotonic() < until
        time.sleep(0.01)
    meter.shutdown()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": "none"},
    ],
)
def test_without_an_endpoint_metrics_are_off(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an endpoint for metrics, or with them switched off, no metric is read."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    meter = configure_metrics("moiety-router")
    assert meter is NO_METER
    meter.observe(MetricName.BUSY, lambda: pytest.fail("read"))
    meter.shutdown()


def test_no_collector_for_metrics_is_quiet_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Without a collector there is at most one warning, no stack trace, and shutdown ends in time."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        meter = configure_metrics("moiety-router", endpoint=f"http://127.0.0.1:{bound.getsockname()[1]}")
        meter.observe(MetricName.BUSY, lambda: 0.5)
        began = time.monotonic()
        meter.shutdown(timeout_s=0.2)
        assert time.monotonic() - began < 5.0
    assert len(caplog.records) <= 1, caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_an_unknown_exporter_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An unknown exporter costs one warning that names it, and `configure_metrics` does not raise."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    with caplog.at_level(logging.WARNING):
        assert configure_metrics("moiety-router") is NO_METER
    assert "OTEL_METRICS_EXPORTER=prometheus" in caplog.text


def test_without_the_package_metrics_are_off() -> None:
    """Without OpenTelemetry, asking for metrics costs one warning; while export is off, it is not loaded."""
    program = (
        "import importlib.util as util, os, sys\n"
        "import moiety.telemetry as telemetry\n"
        "assert telemetry.configure_metrics('moiety-router') is telemetry.NO_METER\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('opentelemetry', 'grpc')]\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'opentelemetry' else find(name, *rest)\n"
        "os.environ['OTEL_METRICS_EXPORTER'] = 'otlp'\n"
        "assert telemetry.configure_metrics('moiety-router') is telemetry.NO_METER\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "metrics are off, because OpenTelemetry is not installed" in done.stderr
