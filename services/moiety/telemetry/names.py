"""Every span, metric and attribute name, declared once. Names follow OpenTelemetry's semantic conventions where one exists.

The spans of one trace nest: client.generate contains generate, which contains engine.request, which contains queue and the
steps. A step contains its layers and sample; a layer contains attention, its hops and park; a hop contains expert, which
contains expert.queue and expert.kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class SpanName(StrEnum):
    """Names of spans: each says what a span measures. Its attributes say which layer, replica or step class it belongs to."""

    CLIENT_GENERATE = "client.generate"  # client: call sent → stream closed
    GENERATE = "generate"  # gateway: request accepted → last text sent
    ENGINE_REQUEST = "engine.request"  # router: request accepted → last token emitted
    QUEUE = "queue"  # router: request accepted → it has a slot
    STEP = "step"  # router: one engine step; STEP_CLASS distinguishes prefill and decode
    ATTENTION = "attention"  # router, in a layer: what runs before its experts (attention, norms, gating)
    LAYER = "layer"  # router, in a step: start of the step or end of the previous layer → all expert rows answered
    PARK = "park"  # router, in a layer: waiting for a live replica that holds an expert of the layer
    HOP = "hop"  # router, in a layer: call sent → reply decoded, one replica
    SAMPLE = "sample"  # router, in a step: last MoE layer done → tokens sampled
    EXPERT = "expert"  # expert: call received → computed or refused
    EXPERT_QUEUE = "expert.queue"  # expert: waiting for the device
    EXPERT_KERNEL = "expert.kernel"  # expert: computing on the device


class SpanKind(StrEnum):
    """The OpenTelemetry span kinds that occur here."""

    CLIENT = "client"
    SERVER = "server"
    INTERNAL = "internal"


_KINDS: Mapping[SpanName, SpanKind] = {
    SpanName.CLIENT_GENERATE: SpanKind.CLIENT,
    SpanName.GENERATE: SpanKind.SERVER,
    SpanName.ENGINE_REQUEST: SpanKind.SERVER,
    SpanName.HOP: SpanKind.CLIENT,
    SpanName.EXPERT: SpanKind.SERVER,
}


def kind_of(name: SpanName) -> SpanKind:
    """Returns CLIENT or SERVER for the name of a span that measures that side of a call, else INTERNAL."""
    return _KINDS.get(name, SpanKind.INTERNAL)


class Attribute(StrEnum):
    """Keys of span attributes, with the type and unit of their values."""

    # Semantic conventions: generative AI.
    OPERATION = "gen_ai.operation.name"  # str: "text_completion" or "chat"
    REQUEST_MODEL = "gen_ai.request.model"  # str
    MAX_TOKENS = "gen_ai.request.max_tokens"  # int
    TEMPERATURE = "gen_ai.request.temperature"  # float
    TOP_P = "gen_ai.request.top_p"  # float
    TOP_K = "gen_ai.request.top_k"  # int
    INPUT_TOKENS = "gen_ai.usage.input_tokens"  # int
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"  # int
    FINISH_REASONS = "gen_ai.response.finish_reasons"  # list of str

    # Semantic conventions: calls, peers, errors.
    SERVER_ADDRESS = "server.address"  # str: host:port
    ERROR_TYPE = "error.type"  # str: class of the exception; set by Span.error

    # Ours: the request.
    REQUEST_ID = "moiety.request_id"  # str

    # float, 0 to 1: fraction of rows that the overflow policy `backup` sent to another expert than the gate's
    REROUTED = "moiety.rerouted"

    # Ours: a step.
    STEP_CLASS = "moiety.step.class"  # str: decode, prefill or mixed
    STEP_SEQUENCES = "moiety.step.sequences"  # int
    STEP_TOKENS = "moiety.step.tokens"  # int: rows that went through the model

    # Ours: a layer and its hops.
    LAYER = "moiety.layer"  # int: ordinal of the MoE layer, from 0
    DEPLOYMENT = "moiety.deployment"  # str, e.g. "experts-3"
    REPLICA = "moiety.replica"  # str: replica id
    ROWS = "moiety.rows"  # int: rows of hidden states sent
    ATTEMPT = "moiety.attempt"  # int, from 0
    HEDGE = "moiety.hedge"  # bool: sent while an earlier call for the same rows is unanswered
    OUTCOME = "moiety.outcome"  # str: the reply's Outcome, e.g. "NOT_HELD"
    QUEUE_MS = "moiety.queue_ms"  # float, milliseconds: waiting for the expert's device
    COMPUTE_MS = "moiety.compute_ms"  # float, milliseconds: on the expert's device
    EXPERTS_ACTIVATED = "moiety.experts.activated"  # int: distinct experts that ran
    BATCH_ROWS = "moiety.batch_rows"  # int: rows of the expert's batch, other calls' included


class MetricName(StrEnum):
    """Names of the metrics that services report periodically. Resource attributes say which service reported a value."""

    BUSY = "moiety.busy"
    QUEUE_WAIT = "moiety.queue_wait"
    ROUTED_ROWS = "moiety.routed_rows"
    REROUTED_ROWS = "moiety.rerouted_rows"
    COST_ERROR = "moiety.cost_model.error"
    OPEN_BREAKERS = "moiety.breakers.open"
    BREAKER_CHANGES = "moiety.breakers.changes"
    TARGET = "moiety.scaling.target"
    TASK_FAILURES = "moiety.task.failures"
    REGISTERED = "moiety.registered"


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is declared to OpenTelemetry: as a counter or as a gauge."""

    description: str
    unit: str = "1"  # UCUM
    cumulative: bool = False  # a counter since the service's start; else a gauge


METRICS: Mapping[MetricName, Metric] = {
    MetricName.BUSY: Metric("busy fraction in the last second: of an expert's device, of a router's slots or KV cache"),
    MetricName.QUEUE_WAIT: Metric("mean wait in the last second: of an expert's calls, of a router's requests", "s"),
    MetricName.ROUTED_ROWS: Metric("(token, expert) rows that a router sent to experts", "{row}", cumulative=True),
    MetricName.REROUTED_ROWS: Metric(
        "routed rows that the overflow policy backup sent to another expert than the gate's",
        "{row}",
        cumulative=True,
    ),
    MetricName.COST_ERROR: Metric("relative error of the worst cost model that a router fits to expert batches"),
    MetricName.OPEN_BREAKERS: Metric(
        "expert replicas that a router avoids, because they failed or fell silent", "{replica}"
    ),
    MetricName.BREAKER_CHANGES: Metric(
        "breakers of expert replicas that opened or closed", "{change}", cumulative=True
    ),
    MetricName.TARGET: Metric("replicas that autoscaling wants, by moiety.deployment", "{replica}"),
    MetricName.TASK_FAILURES: Metric("failures of the service's tasks and threads", "{failure}", cumulative=True),
    MetricName.REGISTERED: Metric(
        "1 if the registry took the service's last heartbeat; 0 if it refused or did not answer"
    ),
}


class ResourceAttribute(StrEnum):
    """Keys of attributes that describe the service on all its spans and metrics.

    One more, `service.name`, is the first argument of `configure` and `configure_metrics`.
    """

    INSTANCE = "service.instance.id"  # str: replica id
    VERSION = "service.version"  # str
    DEPLOYMENT = "moiety.deployment"  # str
