"""The meter the rest of the code knows, its no-op twin, and `configure_metrics`, which picks one of the two.

Figures are read from what services count anyway, by the exporter's thread whenever it exports: being measured costs the
measured nothing. As with tracers, no meter is global.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from moiety.telemetry.export_enabled import export_enabled
from moiety.telemetry.names import Attribute, MetricName
from moiety.telemetry.tracing import Value

_logger = logging.getLogger("moiety.telemetry")


class Meter(Protocol):
    """Exports the figures of one service, every OTEL_METRIC_EXPORT_INTERVAL milliseconds and once more at the end."""

    def observe(
        self, name: MetricName, read: Callable[[], float | None], attributes: Mapping[Attribute, Value] | None = None
    ) -> None:
        """Has `read()` called for every export, on another thread; None where there is nothing to tell yet.

        Another `read` for the same name and attributes replaces the first.
        """
        ...

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Exports once more and stops within `timeout_s` and a moment. Never raises."""
        ...


class _NoMeter:
    __slots__ = ()

    def observe(
        self, name: MetricName, read: Callable[[], float | None], attributes: Mapping[Attribute, Value] | None = None
    ) -> None:
        """Never calls it."""

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Nothing to stop."""


NO_METER: Meter = _NoMeter()


def configure_metrics(
    service: str, attributes: Mapping[str, str] | None = None, *, endpoint: str | None = None
) -> Meter:
    """The meter of one service: a real one if the OTEL_* variables ask for OTLP, else NO_METER.

    Arguments and failures are as those of `tracing.configure`.
    """
    if not export_enabled("metrics", endpoint):
        return NO_METER
    try:
        from moiety.telemetry.otel_metrics import OtelMeter

        return OtelMeter(service, dict(attributes or {}), endpoint)
    except Exception as error:
        _logger.warning("metrics are off: %s: %s", type(error).__name__, error)
        return NO_METER
