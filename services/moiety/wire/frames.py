"""Forward calls as values: parsed from the codec's frames, with all sizes checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moiety.core.expert_backend import CallClass
from moiety.errors import InvalidRequest
from moiety.internal.v1.experts_pb2 import CALL_CLASS_PREFILL, ForwardRequest, ForwardResponse
from moiety.wire import codec
from moiety.wire.deadline import Deadline
from moiety.wire.rows import RowBuffer, SelectedRows

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


def parse_call(header: ForwardRequest, payload: memoryview, *, dtype: str, hidden: int, row_bytes: int) -> ForwardCall:
    """Checks a received ForwardRequest and its payload, and returns them as a ForwardCall.

    Raises InvalidRequest if the fields contradict each other, or if the rows do not have the format that DescribeReplica
    reports: `hidden` elements of `dtype` in `row_bytes` bytes.
    """
    if header.dtype != dtype:
        raise InvalidRequest("dtype", header.dtype, f"{dtype}, as DescribeReplica says")
    if len(header.k_offsets) != 4 * (header.rows + 1):
        raise InvalidRequest(
            "k_offsets", f"{len(header.k_offsets)} bytes", f"{4 * (header.rows + 1)} bytes: rows + 1 int32"
        )
    if len(payload) != header.rows * row_bytes:
        raise InvalidRequest(
            "payload",
            f"{len(payload)} bytes",
            f"{header.rows * row_bytes} bytes: {header.rows} rows of {hidden} {dtype}",
        )
    offsets = codec.int32_array(header.k_offsets)
    if len(header.experts) % 4:
        raise InvalidRequest("experts", f"{len(header.experts)} bytes", "a multiple of 4 bytes, the size of an int32")
    experts = codec.int32_array(header.experts)
    if offsets[0] != 0 or offsets[-1] != len(experts) or (offsets[1:] < offsets[:-1]).any():
        raise InvalidRequest(
            "k_offsets", offsets[:8].tolist(), f"non-decreasing from 0 to {len(experts)}, the number of experts"
        )
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
