"""One Forward call as the router's end knows it: what is in flight, and the message that says it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moiety.core.expert_backend import CallClass
from moiety.internal.v1 import experts_pb2
from moiety.telemetry.tracing import Span
from moiety.wire import codec

CALL_TIMEOUT_S = 10.0  # a replica that answers pings but not a call for this long is broken


@dataclass(slots=True)
class CallInFlight:
    """One message in flight."""

    replica: str
    assignments: np.ndarray  # which of the layer's A = T * K (token, expert) pairs it is to bring, ascending
    attempt: int
    sent: float
    hedge_at: float
    hedge_of: int | None  # call id of the slow call that this one doubles
    span: Span


def request_for(
    assignments: np.ndarray, experts: np.ndarray, top_k: int, call_class: CallClass
) -> tuple[experts_pb2.ForwardRequest, np.ndarray]:
    """(the request, tokens whose rows go with it, once each) for `assignments`, indices into `experts` [A].

    Who it is from, and what it is of, is left for the caller to fill in.
    """
    token_of = assignments // top_k  # ascending, as the assignments are
    first = np.ones(len(assignments) + 1, dtype=bool)  # of its token's run; the end counts as one too
    np.not_equal(token_of[1:], token_of[:-1], out=first[1:-1])
    offsets = first.nonzero()[0]
    prefill = call_class is CallClass.PREFILL
    request = experts_pb2.ForwardRequest(
        rows=len(offsets) - 1,
        k_offsets=codec.int32_bytes(offsets),
        experts=codec.int32_bytes(experts[assignments]),
        call_class=experts_pb2.CALL_CLASS_PREFILL if prefill else experts_pb2.CALL_CLASS_DECODE,
        deadline_ms=int(CALL_TIMEOUT_S * 1000),
    )
    return request, token_of[offsets[:-1]]


def outcome_name(outcome: int) -> str:
    """As experts.proto calls it; a newer replica may know outcomes that we do not."""
    if outcome in experts_pb2.Outcome.values():
        return experts_pb2.Outcome.Name(outcome).removeprefix("OUTCOME_")
    return f"outcome {outcome}"
