"""The `Meter` interface that the rest of the code uses, and its no-op twin.

At each export, the exporter's thread reads counts that services keep anyway. So serving a request does no work for
metrics. No meter is global, so that several services can share a process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from moiety.telemetry.names import Attribute, MetricName
from moiety.telemetry.tracing import Value


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
