"""Forward calls as values: parsed from the codec's frames, with all sizes checked before memory is allocated for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moiety.core.expert_backend import CallClass
from moiety.core.experts import ModelShape
from moiety.errors import InvalidRequest
from moiety.internal.v1.experts_pb2 import CALL_CLASS_PREFILL, ForwardRequest, ForwardResponse
from moiety.wire import codec
from moiety.wire.channels import MAX_MESSAGE_BYTES
from moiety.wire.deadline import Deadline
from moiety.wire.rows import RowBuffer, SelectedRows

MAX_ROWS_BYTES = MAX_MESSAGE_BYTES - (1 << 16)  # of a reply; the rest of the message is for the other fields
ReplyCallback = Callable[[ForwardResponse, SelectedRows | None], None]  # receives the one answer to a call


@dataclass(slots=True)  # not frozen: a frozen one takes twice as long to create, and every call creates one
class ForwardCall:
    """One call as an expert replica received it: R rows, A assignments of a row to an expert."""

    call_id: int
    attempt: int
    layer: int
    call_class: CallClass
    deadline: Deadline
    traceparent: str
    k_offsets: np.ndarray  # int32 [R + 1]
    experts: np.ndarray  # int32 [A], global ids
    payload: RowBuffer  # [R]
    sent: float = 0.0  # monotonic clock, in seconds, when it was sent through shared memory; 0: other transports

    @property
    def row_of(self) -> np.ndarray:
        """[A]: the index of each assignment's row."""
        return np.repeat(np.arange(len(self.k_offsets) - 1), np.diff(self.k_offsets))


def parse_call(header: ForwardRequest, payload: memoryview, *, shape: ModelShape, dtype: str) -> ForwardCall:
    """Checks a received ForwardRequest and its payload, and returns them as a ForwardCall.

    `dtype` is that of the rows on the wire, as DescribeReplica reports it. Raises InvalidRequest if the fields contradict
    each other or `shape`, if a row names more than `shape.top_k` experts, or if the rows of the answer would not fit into a
    message. So a call's work is at most rows x top-k, and its memory at most two messages.
    """
    row_bytes = shape.mlp.hidden * codec.DTYPES[dtype].itemsize
    if header.dtype != dtype:
        raise InvalidRequest("dtype", header.dtype, f"{dtype}, as DescribeReplica says")
    if header.HasField("payload_bytes") and header.payload_bytes != len(payload):
        raise InvalidRequest(
            "payload_bytes", header.payload_bytes, f"{len(payload)}, the length of the payload in bytes"
        )
    if len(header.k_offsets) != 4 * (header.rows + 1):
        raise InvalidRequest(
            "k_offsets", f"{len(header.k_offsets)} bytes", f"{4 * (header.rows + 1)} bytes: rows + 1 int32"
        )
    if len(payload) != header.rows * row_bytes:
        raise InvalidRequest(
            "payload",
            f"{len(payload)} bytes",
            f"{header.rows * row_bytes} bytes: {header.rows} rows of {shape.mlp.hidden} {dtype}",
        )
    if header.layer >= shape.moe_layers:
        raise InvalidRequest("layer", header.layer, f"below {shape.moe_layers}, the model's MoE layers")
    if len(header.experts) % 4:
        raise InvalidRequest("experts", f"{len(header.experts)} bytes", "a multiple of 4 bytes, the size of an int32")
    offsets, experts = codec.int32_array(header.k_offsets), codec.int32_array(header.experts)
    _check_assignments(offsets, experts, shape)
    if len(experts) * row_bytes > MAX_ROWS_BYTES:
        bound = f"at most {MAX_ROWS_BYTES // row_bytes}, so that the answer's rows fit into a message: split the call"
        raise InvalidRequest("assignments", len(experts), bound)
    return ForwardCall(
        call_id=header.call_id,
        attempt=header.attempt,
        layer=header.layer,
        call_class=CallClass.PREFILL if header.call_class == CALL_CLASS_PREFILL else CallClass.DECODE,
        deadline=Deadline.after(header.deadline_ms / 1000 if header.deadline_ms else None),
        traceparent=header.traceparent,
        k_offsets=offsets,
        experts=experts,
        payload=RowBuffer.within(payload, row_bytes),
        sent=header.sent_ns / 1e9,
    )


def _check_assignments(offsets: np.ndarray, experts: np.ndarray, shape: ModelShape) -> None:
    """Raises InvalidRequest unless each row names at most top-k experts, all of the model."""
    counts = (offsets[1:] - offsets[:-1]).view(np.uint32)  # a negative count becomes a very large one
    if offsets[0] != 0 or offsets[-1] != len(experts) or counts.max(initial=0) > shape.top_k:
        bound = f"non-decreasing from 0 to {len(experts)}, the number of experts, in steps of at most {shape.top_k}, the top-k"
        raise InvalidRequest("k_offsets", offsets[:8].tolist(), bound)
    if experts.view(np.uint32).max(initial=0) >= shape.experts:
        raise InvalidRequest(
            "experts", experts[:8].tolist(), f"0 to {shape.experts - 1}, the model's experts per layer"
        )
