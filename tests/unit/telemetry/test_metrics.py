"""Figures from `configure_metrics` to a real OTLP endpoint, and nothing at all where nobody asked for them."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from moiety.telemetry import NO_METER, Attribute, MetricName, ResourceAttribute, configure_metrics
from moiety.tools.trace.receiver import TraceReceiver


@pytest.fixture(autouse=True)
def no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the person who runs the tests play no part."""
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[TraceReceiver]:
    """A collector that the environment points at."""
    with TraceReceiver() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        yield collector


def test_figures_arrive_with_kind_unit_and_attributes(receiver: TraceReceiver) -> None:
    """What was observed is exported at the end at the latest; what has nothing to tell, or fails, keeps none from it."""
    meter = configure_metrics("moiety-router", {ResourceAttribute.INSTANCE: "router-1"})
    meter.observe(MetricName.BUSY, lambda: 0.25)
    meter.observe(MetricName.ROUTED_ROWS, lambda: 1 << 40)
    meter.observe(MetricName.COST_ERROR, lambda: None)
    meter.observe(MetricName.QUEUE_WAIT, lambda: 1 // 0)
    for deployment, target in (("experts-0", 1), ("experts-1", 2), ("experts-1", 3)):
        meter.observe(MetricName.TARGET, lambda target=target: target, {Attribute.DEPLOYMENT: deployment})
    meter.shutdown()
    figures = {(each.name, each.attributes.get("moiety.deployment")): each for each in receiver.figures()}
    assert {key: (each.value, each.unit, each.cumulative) for key, each in figures.items()} == {
        ("moiety.busy", None): (0.25, "1", False),
        ("moiety.routed_rows", None): (1 << 40, "{row}", True),
        ("moiety.scaling.target", "experts-0"): (1, "{replica}", False),
        ("moiety.scaling.target", "experts-1"): (3, "{replica}", False),
    }
    assert {each.service for each in figures.values()} == {"moiety-router"}
    assert {each.attributes["service.instance.id"] for each in figures.values()} == {"router-1"}


def test_figures_are_exported_now_and_then(receiver: TraceReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that grows is told again without anyone asking."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    reads = iter(range(10_000))
    meter = configure_metrics("moiety-router")
    meter.observe(MetricName.ROUTED_ROWS, lambda: next(reads))
    until = time.monotonic() + 10.0
    while not any(figure.value >= 2 for figure in receiver.figures()):
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
def test_nobody_asked_for_figures(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an endpoint for metrics, or with them switched off, nothing is ever read."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    meter = configure_metrics("moiety-router")
    assert meter is NO_METER
    meter.observe(MetricName.BUSY, lambda: pytest.fail("read"))
    meter.shutdown()


def test_no_collector_for_figures_is_quiet_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """With nothing at the endpoint: one warning at most, no stack trace, and shutdown comes back in time."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        meter = configure_metrics("moiety-router", endpoint=f"http://127.0.0.1:{bound.getsockname()[1]}")
        meter.observe(MetricName.BUSY, lambda: 0.5)
        began = time.monotonic()
        meter.shutdown(timeout_s=0.3)
        assert time.monotonic() - began < 2.0
    assert len(caplog.records) <= 1, caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_an_unknown_exporter_of_figures_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It costs one warning that names it, never the service."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    with caplog.at_level(logging.WARNING):
        assert configure_metrics("moiety-router") is NO_METER
    assert "OTEL_METRICS_EXPORTER=prometheus" in caplog.text


def test_without_the_package_metrics_are_off() -> None:
    """Where OpenTelemetry is not installed, asking costs one warning; where nobody asks, it is not even loaded."""
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
    assert "metrics are asked for, but OpenTelemetry is not installed" in done.stderr
