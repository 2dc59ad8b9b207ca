"""A small OTLP/gRPC endpoint that keeps spans and metric values in memory: the collector of the demo and of tests."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from moiety.telemetry.tracing import Value
from moiety.tools.trace.spans import ReceivedMetric, ReceivedSpan

_MAX_MESSAGE_BYTES = 16 << 20
_STATUS = {trace_pb2.Status.STATUS_CODE_OK: "ok", trace_pb2.Status.STATUS_CODE_ERROR: "error"}
_KIND = {trace_pb2.Span.SPAN_KIND_CLIENT: "client", trace_pb2.Span.SPAN_KIND_SERVER: "server"}


class TraceReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Receives spans and metric values from construction to `close()`; keeps the newest `limit` spans.

    Listens on `port` of `host`; port 0 = any free port.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, limit: int = 200_000) -> None:
        self._spans: deque[ReceivedSpan] = deque(maxlen=limit)
        self._arrived = threading.Condition()
        self._figures = _FigureReceiver(self._arrived)
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=2, thread_name_prefix="trace-receiver"),
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)],
        )
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(self._figures, self._server)
        bound = self._server.add_insecure_port(f"{host}:{port}")
        self.endpoint = f"http://{host}:{bound}"  # for OTEL_EXPORTER_OTLP_ENDPOINT
        self._server.start()

    def spans(self) -> tuple[ReceivedSpan, ...]:
        """Returns the spans received so far, in order of arrival."""
        with self._arrived:
            return tuple(self._spans)

    def wait_for(
        self, predicate: Callable[[Sequence[ReceivedSpan]], bool], timeout_s: float = 10.0
    ) -> tuple[ReceivedSpan, ...]:
        """Waits until `predicate` is true of all spans received so far, and returns these spans.

        Raises TimeoutError after `timeout_s`, with the names of the spans that did arrive.
        """
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while not predicate(spans := tuple(self._spans)):
                if not self._arrived.wait(deadline - time.monotonic()):
                    names = ", ".join(sorted({span.name for span in spans})) or "none"
                    raise TimeoutError(
                        f"the expected spans did not arrive within {timeout_s:g} s; {len(spans)} arrived: {names}"
                    )
        return spans

    def metrics(self) -> tuple[ReceivedMetric, ...]:
        """Returns the latest value of each metric, for each service and set of attributes."""
        with self._arrived:
            return tuple(self._figures.latest.values())

    def clear(self) -> None:
        """Drops all spans and metric values received so far."""
        with self._arrived:
            self._spans.clear()
            self._figures.latest.clear()

    def close(self) -> None:
        """Stops listening. The spans stay readable."""
        self._server.stop(grace=0.5).wait()

    def __enter__(self) -> TraceReceiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Stores the spans that an exporter sends: the Export RPC of OTLP."""
        received = list(_read(request))
        with self._arrived:
            self._spans.extend(received)
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


class _FigureReceiver(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, arrived: threading.Condition) -> None:
        self._arrived = arrived
        self.latest: dict[tuple[object, ...], ReceivedMetric] = {}

    def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        with self._arrived:
            for figure in _read_figures(request):
                self.latest[(figure.name, figure.service, *sorted(map(str, figure.attributes.items())))] = figure
            self._arrived.notify_all()
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _read_figures(request: metrics_service_pb2.ExportMetricsServiceRequest) -> Iterator[ReceivedMetric]:
    for resource_metrics in request.resource_metrics:
        resource = _attributes(resource_metrics.resource.attributes)
        for metric in (metric for scope in resource_metrics.scope_metrics for metric in scope.metrics):
            cumulative = metric.WhichOneof("data") == "sum"
            for point in (metric.sum if cumulative else metric.gauge).data_points:
                yield ReceivedMetric(
                    name=metric.name,
                    service=str(resource.get("service.name", "")),
                    value=point.as_double if point.WhichOneof("value") == "as_double" else point.as_int,
                    unit=metric.unit,
                    cumulative=cumulative,
                    attributes={**resource, **_attributes(point.attributes)},
                )


def _read(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield ReceivedSpan(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    name=span.name,
                    service=str(resource.get("service.name", "")),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes={**resource, **_attributes(span.attributes)},
                    links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    status=_STATUS.get(span.status.code, "unset"),
                    message=span.status.message,
                    kind=_KIND.get(span.kind, "internal"),
                )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "array_value":
            return tuple(_value(item) for item in value.array_value.values)  # type: ignore[return-value]
        case _:
            return str(value)
