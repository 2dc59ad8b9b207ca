"""`Meter` on the OpenTelemetry SDK: a provider, periodic reader and exporter for each service."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from moiety.telemetry.names import METRICS, Attribute, MetricName
from moiety.telemetry.quiet_export import OutageLog
from moiety.telemetry.tracing import Value

Read = Callable[[], float | None]
Labels = tuple[tuple[str, Value], ...]


class OtelMeter:
    """Exports the metrics of one service over OTLP/gRPC, on a thread of the SDK's periodic reader."""

    def __init__(self, service: str, attributes: Mapping[str, str], endpoint: str | None) -> None:
        self._exporter = _QuietExporter(endpoint)
        self._reads: dict[MetricName, dict[Labels, Read]] = {}
        # Not the global provider, for the same reasons as in OtelTracer.
        self._provider = MeterProvider(
            [PeriodicExportingMetricReader(self._exporter)],
            Resource.create({**attributes, "service.name": service}),
            shutdown_on_exit=False,
        )
        self._meter = self._provider.get_meter("moiety")

    def observe(self, name: MetricName, read: Read, attributes: Mapping[Attribute, Value] | None = None) -> None:
        labels = tuple((key.value, value) for key, value in (attributes or {}).items())
        if name in self._reads:
            self._reads[name][labels] = read
        else:
            self._reads[name] = {labels: read}
            metric = METRICS[name]
            create: Callable[..., object] = (
                self._meter.create_observable_counter if metric.cumulative else self._meter.create_observable_gauge
            )
            create(name.value, [partial(self._observations, name)], metric.unit, metric.description)

    def shutdown(self, timeout_s: float = 2.0) -> None:
        self._exporter.outages.drain(timeout_s, partial(self._provider.shutdown, 1000 * timeout_s))

    def _observations(self, name: MetricName, _: CallbackOptions) -> Iterable[Observation]:
        for labels, read in list(self._reads[name].items()):  # a copy: another thread may call `observe`
            if (value := read()) is not None:
                yield Observation(value, dict(labels))


class _QuietExporter(OTLPMetricExporter):
    """The SDK's OTLP exporter, but it logs each outage once."""

    def __init__(self, endpoint: str | None) -> None:
        super().__init__(endpoint=endpoint)
        self.outages = OutageLog("metrics", super().shutdown)

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any) -> MetricExportResult:
        send = partial(super().export, metrics_data, timeout_millis, **options)
        return self.outages.export(send, MetricExportResult.SUCCESS, MetricExportResult.FAILURE)

    def shutdown(self, timeout_millis: float = 30_000, **_options: Any) -> None:
        self.outages.close()
