"""Decides whether the OTEL_* environment variables ask for OTLP export.

Only if they do is the OpenTelemetry SDK loaded. It reads the remaining OTEL_* variables itself.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Literal

Signal = Literal["traces", "metrics"]

_logger = logging.getLogger("moiety.telemetry")


def export_enabled(signal: Signal, endpoint: str | None) -> bool:
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
