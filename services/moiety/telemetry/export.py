"""Gives each service its tracer and its meter: on the OpenTelemetry SDK if the OTEL_* variables ask for export, else no-ops.

Only if they do is the SDK loaded. It reads the remaining OTEL_* variables itself.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

from moiety.telemetry.metrics import NO_METER, Meter
from moiety.telemetry.tracing import NO_TRACER, Tracer

Signal = Literal["traces", "metrics"]
Made = TypeVar("Made", Tracer, Meter)

_logger = logging.getLogger("moiety.telemetry")


def configure(service: str, attributes: Mapping[str, str] | None = None, *, endpoint: str | None = None) -> Tracer:
    """Returns the tracer of one service: a real one if the OTEL_* variables ask for OTLP, else NO_TRACER.

    Every span carries `service` as its service.name, and `attributes` (names.ResourceAttribute). `endpoint`
    (http://host:port) replaces OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, and asks for OTLP as that variable does. If tracing
    cannot be set up, one warning is logged and the service runs without it.
    """

    def tracer() -> Tracer:
        from moiety.telemetry.otel import OtelTracer

        return OtelTracer(service, attributes or {}, endpoint)

    return _exporting("traces", endpoint, tracer, NO_TRACER)


def configure_metrics(
    service: str, attributes: Mapping[str, str] | None = None, *, endpoint: str | None = None
) -> Meter:
    """Returns the meter of one service, as `configure` returns its tracer: a real one or NO_METER."""

    def meter() -> Meter:
        from moiety.telemetry.otel_metrics import OtelMeter

        return OtelMeter(service, attributes or {}, endpoint)

    return _exporting("metrics", endpoint, meter, NO_METER)


def _exporting(signal: Signal, endpoint: str | None, make: Callable[[], Made], off: Made) -> Made:
    """Returns `make()` if the OTEL_* variables or an `endpoint` ask for the export of `signal`, else `off`.

    Logs the reason and returns `off` if the export is asked for but not possible.
    """
    if not _wanted(signal, endpoint):
        return off
    if any(importlib.util.find_spec(package) is None for package in ("opentelemetry", "grpc")):
        _logger.warning("%s are off, because OpenTelemetry is not installed: pip install 'moiety[serve]'", signal)
        return off
    try:
        return make()
    except Exception as error:
        _logger.warning("%s are off: %s: %s", signal, type(error).__name__, error)
        return off


def _wanted(signal: Signal, endpoint: str | None) -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    exporters = {name.strip().lower() for name in os.environ.get(variable, "").split(",")} - {""}
    if exporters and "otlp" not in exporters:
        if exporters != {"none"}:
            names = ",".join(exporters)
            _logger.warning("%s=%s: must be otlp or none; %s are off", variable, names, signal)
        return False
    prefix = f"OTEL_EXPORTER_OTLP_{signal.upper()}_"
    endpoints = (f"{prefix}ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not (exporters or endpoint or any(os.environ.get(name) for name in endpoints)):
        return False
    protocol = os.environ.get(f"{prefix}PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "grpc"):
        _logger.warning("OTLP protocol %s: must be grpc; %s are off", protocol, signal)
        return False
    return True
