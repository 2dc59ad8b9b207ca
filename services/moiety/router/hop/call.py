"""A layer's rows, and one Forward call as the router sees it: its record while in flight, and the request message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moiety.core.expert_backend import CallClass
from moiety.errors import MoietyError
from moiety.internal.v1 import experts_pb2
from moiety.telemetry.tracing import Span
from moiety.wire import codec
from moiety.wire.channels import MAX_MESSAGE_BYTES
from moiety.wire.rows import RowBuffer
from moiety.wire.transports.connection import Reply

MAX_CALL_BYTES = MAX_MESSAGE_BYTES // 2  # of rows, in each direction; a larger message would break the stream


@dataclass(slots=True)
class CallInFlight:
    """A call that has been sent and not yet answered. Times are seconds of `time.monotonic()`."""

    replica: str
    assignments: np.ndarray  # the (token, expert) pairs it computes: ascending indices into the layer's A = T * K pairs
    attempt: int
    sent: float
    hedge_at: float
    look_at: float  # when to look whether it is slow
    probe: bool  # it shows whether a replica with an open breaker has recovered
    hedge_of: int | None  # call id of the slow call that this one duplicates
    span: Span


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """One layer's rows, and the expert of each assignment. The caller owns the memory of both buffers."""

    layer: int
    top_k: int  # K
    experts: np.ndarray  # int64 [A]; -1: no expert
    wanted: np.ndarray  # int64: the assignments that have an expert, ascending
    hidden: RowBuffer  # [T]
    output: RowBuffer  # [A]: where the results go; zeros for assignments without an expert


def split_by_size(assignments: np.ndarray, row_bytes: int) -> Sequence[np.ndarray]:
    """Splits `assignments` into calls whose rows of `row_bytes` stay within MAX_CALL_BYTES each."""
    pieces = -(-len(assignments) * row_bytes // MAX_CALL_BYTES)
    return np.array_split(assignments, pieces) if pieces > 1 else (assignments,)


def request_for(
    assignments: np.ndarray, experts: np.ndarray, top_k: int, call_class: CallClass
) -> tuple[experts_pb2.ForwardRequest, np.ndarray]:
    """Builds the request for `assignments` (indices into `experts` [A]). Returns the request and the tokens to send.

    A token with several assignments is sent once. The caller fills in the call id, attempt, layer, system, dtype and
    traceparent. There is no deadline: a call that is no longer needed is cancelled.
    """
    token_of = assignments // top_k  # ascending, as the assignments are
    first = np.ones(len(assignments) + 1, dtype=bool)  # first of its token's run; the end counts as a start too
    np.not_equal(token_of[1:], token_of[:-1], out=first[1:-1])
    offsets = first.nonzero()[0]
    prefill = call_class is CallClass.PREFILL
    request = experts_pb2.ForwardRequest(
        rows=len(offsets) - 1,
        k_offsets=codec.int32_bytes(offsets),
        experts=codec.int32_bytes(experts[assignments]),
        call_class=experts_pb2.CALL_CLASS_PREFILL if prefill else experts_pb2.CALL_CLASS_DECODE,
    )
    return request, token_of[offsets[:-1]]


def size_error(call: CallInFlight, reply: Reply, row_bytes: int) -> MoietyError | None:
    """Returns the error of a reply that does not hold one row of `row_bytes` per assignment, None for a good one."""
    expected = len(call.assignments) * row_bytes
    if len(reply.payload) == expected:
        return None
    sent = f"sent {len(reply.payload)} bytes for {len(call.assignments)} rows, expected {expected}"
    return MoietyError(f"replica {call.replica} {sent}")


def refusal(call: CallInFlight, reply: experts_pb2.ForwardResponse) -> MoietyError:
    """Returns the error of a reply without rows. `detail` is the replica's text, of any length."""
    return MoietyError(f"replica {call.replica} answered {outcome_name(reply.outcome)}: {reply.detail[:500]}")


def outcome_name(outcome: int) -> str:
    """Returns the name of `outcome` in experts.proto. A newer replica may send an unknown outcome: returns its number."""
    if outcome in experts_pb2.Outcome.values():
        return experts_pb2.Outcome.Name(outcome).removeprefix("OUTCOME_")
    return f"outcome {outcome}"
