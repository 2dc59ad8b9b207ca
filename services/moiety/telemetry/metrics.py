"""The `Meter` interface that the rest of the code uses, its no-op twin, and `configure_metrics`, which returns one of them.

At each export, the exporter's thread reads counts that services keep anyway. So serving a request does no work for
metrics. No meter is global, so that several services can share a process.
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
    """Exports the metrics of one service, every OTEL_METRIC_EXPORT_INTERVAL milliseconds and once more at the end."""

    def observe(
        self, name: MetricName, read: Callable[[], float | None], attributes: Mapping[Attribute, Value] | None = None
    ) -> None:
        """Registers `read` as the source of a metric's value. `read` may return None while there is no value.

        Each export calls `read`, on another thread. A second `read` for the same name and attributes replaces the first.
        """
        ...

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Exports once more and stops. Returns soon after `timeout_s` seconds at the latest. Never raises."""
        ...


class _NoMeter:
    __slots__ = ()

    def observe(
        self, name: MetricName, read: Callable[[], float | None], attributes: Mapping[Attribute, Value] | None = None
    ) -> None:
        """Does nothing: `read` is never called."""

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Does nothing."""


NO_METER: Meter = _NoMeter()


def configure_metrics(
    service: str, attributes: Mapping[str, str] | None = None, *, endpoint: str | None = None
) -> Meter:
    """Returns the meter of one service: a real one if the OTEL_* variables ask for OTLP, else NO_METER.

    The arguments are those of `tracing.configure`. If metrics cannot be set up, one warning is logged and they stay off.
    """
    if not export_enabled("metrics", endpoint):
        return NO_METER
    try:
        from moiety.telemetry.otel_metrics import OtelMeter

        return OtelMeter(service, dict(attributes or {}), endpoint)
    except Exception as error:
        _logger.warning("metrics are off: %s: %s", type(error).__name__, error)
        return NO_METER
