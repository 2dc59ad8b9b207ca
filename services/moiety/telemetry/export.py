"""Gives each service its tracer and its meter: on the OpenTelemetry SDK if the OTEL_* variables ask for export, else no-ops.

Only if they do is the SDK loaded. It reads the remaining OTEL_* variables itself.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Literal

from moiety.telemetry.metrics import NO_METER, Meter
from moiety.telemetry.tracing import NO_TRACER, Tracer

Signal = Literal["traces", "metrics"]

_logger = logging.getLogger("moiety.telemetry")


def configure(service: str, attributes: Mapping[str, str] | None = None, *, endpoint: str | None = None) -> Tracer:
    """Returns the tracer of one service: a real one if the OTEL_* variables ask for OTLP, else NO_TRACER.

    Every span carries `service` as its service.name, and `attributes` (names.ResourceAttribute). `endpoint`
    (http://host:port) replaces OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, and asks for OTLP as that variable does. If tracing
    cannot be set up, one warning is logged and the service runs without it.
    """
    if not _enabled("traces", endpoint):
        return NO_TRACER
    try:
        from moiety.telemetry.otel import OtelTracer

        return OtelTracer(service, dict(attributes or {}), endpoint)
    except Exception as error:
        _logger.warning("traces are off: %s: %s", type(error).__name__, error)
        return NO_TRACER


def configure_metrics(
    service: str, attributes: Mapping[str, str] | None = None, *, endpoint: str | None = None
) -> Meter:
    """Returns the meter of one service: a real one if the OTEL_* variables ask for OTLP, else NO_METER.

    The arguments are those of `configure`. If metrics cannot be set up, one warning is logged and they stay off.
    """
    if not _enabled("metrics", endpoint):
        return NO_METER
    try:
        from moiety.telemetry.otel_metrics import OtelMeter

        return OtelMeter(service, dict(attributes or {}), endpoint)
    except Exception as error:
        _logger.warning("metrics are off: %s: %s", type(error).__name__, error)
        return NO_METER


def _enabled(signal: Signal, endpoint: str | None) -> bool:
    """Returns whether to export `signal`: the OTEL_* variables or an `endpoint` ask for it, and it can be exported.

    Logs the reason if the export is asked for but not possible.
    """
    if not _wanted(signal, endpoint):
        return False
    if any(importlib.util.find_spec(package) is None for package in ("opentelemetry", "grpc")):
        _logger.warning("%s are off, because OpenTelemetry is not installed: pip install 'moiety[serve]'", signal)
        return False
    return True


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
