"""Whether the OTEL_* variables ask for a signal over OTLP: only then is the SDK loaded, which reads the rest itself."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Literal

Signal = Literal["traces", "metrics"]

_logger = logging.getLogger("moiety.telemetry")


def export_enabled(signal: Signal, endpoint: str | None) -> bool:
    """Whether `signal` is to be exported and can be; where it can't, the log says why. `endpoint` asks for it too."""
    if not _wanted(signal, endpoint):
        return False
    if any(importlib.util.find_spec(package) is None for package in ("opentelemetry", "grpc")):
        _logger.warning("%s are asked for, but OpenTelemetry is not installed: pip install 'moiety[serve]'", signal)
        return False
    return True


def _wanted(signal: Signal, endpoint: str | None) -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    exporters = {name.strip().lower() for name in os.environ.get(variable, "").split(",")} - {""}
    if exporters and "otlp" not in exporters:
        if exporters != {"none"}:
            told = ",".join(exporters)
            _logger.warning("%s=%s: only otlp and none are known; %s are off", variable, told, signal)
        return False
    of_signal = f"OTEL_EXPORTER_OTLP_{signal.upper()}_"
    endpoints = (f"{of_signal}ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not (exporters or endpoint or any(os.environ.get(name) for name in endpoints)):
        return False
    protocol = os.environ.get(f"{of_signal}PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "grpc"):
        _logger.warning("OTLP protocol %s: only grpc is known; %s are off", protocol, signal)
        return False
    return True
