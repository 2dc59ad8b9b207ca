"""A Forward call is checked: its fields against each other, and against the replica's description."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moiety.core.expert_backend import CallClass
from moiety.errors import InvalidRequest
from moiety.internal.v1.experts_pb2 import CALL_CLASS_PREFILL, ForwardRequest
from moiety.testing import fake_shape
from moiety.wire import codec
from moiety.wire.frames import ForwardCall, parse_call

SHAPE = fake_shape(layers=2, experts=6, top_k=2, hidden=4)
ROW_BYTES = 4 * SHAPE.mlp.hidden


def int32(*values: int) -> bytes:
    """Encodes little-endian int32."""
    return codec.int32_bytes(np.array(values, dtype=np.int64))


def parse(payload: bytes = bytes(2 * ROW_BYTES), **changes: Any) -> ForwardCall:
    """A call of two rows for three experts, with `changes` to its header."""
    fields = {
        "rows": 2,
        "dtype": "float32",
        "k_offsets": int32(0, 1, 3),
        "experts": int32(5, 0, 5),
        "layer": 1,
        **changes,
    }
    header = ForwardRequest(**fields)
    return parse_call(header, memoryview(payload), shape=SHAPE, dtype="float32")


def test_a_good_call_is_read():
    """Rows, experts and class are what the router sent; row_of is the row of each assignment."""
    call = parse(call_id=9, attempt=1, call_class=CALL_CLASS_PREFILL)
    assert call.experts.tolist() == [5, 0, 5]
    assert call.row_of.tolist() == [0, 1, 1]
    assert (call.call_id, call.attempt, call.layer, call.call_class) == (9, 1, 1, CallClass.PREFILL)
    assert len(call.payload) == 2
    assert not call.deadline.passed
    assert call.deadline.left() == float("inf")


def test_time_left_becomes_a_deadline():
    """deadline_ms counts from the arrival of the call."""
    assert 0 < parse(deadline_ms=60_000).deadline.left() <= 60


def test_a_call_of_no_rows_is_a_call():
    """A call of zero rows is valid."""
    call = parse(b"", rows=0, k_offsets=int32(0), experts=b"")
    assert (len(call.payload), len(call.experts), len(call.row_of)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("field", "changes", "said"),
    [
        ("dtype", {"dtype": "bfloat16"}, "float32"),
        ("dtype", {"dtype": ""}, "float32"),
        ("k_offsets", {"k_offsets": int32(0, 1)}, "12 bytes"),
        ("k_offsets", {"k_offsets": b""}, "12 bytes"),
        ("k_offsets", {"rows": 4_294_967_295}, "17179869184 bytes"),
        ("k_offsets", {"k_offsets": int32(0, 4, 3)}, "non-decreasing from 0 to 3"),
        ("k_offsets", {"k_offsets": int32(1, 2, 3)}, "non-decreasing from 0 to 3"),
        ("k_offsets", {"k_offsets": int32(0, -1, 3)}, "non-decreasing from 0 to 3"),
        ("k_offsets", {"k_offsets": int32(0, 1, 2)}, "non-decreasing from 0 to 3"),
        ("k_offsets", {"k_offsets": int32(0, 0, 3)}, "in steps of at most 2, the top-k"),
        ("k_offsets", {"k_offsets": int32(0, -(2**31), 3)}, "non-decreasing from 0 to 3"),
        ("experts", {"experts": b"12345"}, "int32"),
        ("experts", {"experts": int32(0, 1, 6)}, "0 to 5"),
        ("experts", {"experts": int32(0, 1, -1)}, "0 to 5"),
        ("layer", {"layer": 2}, "below 2"),
        ("payload_bytes", {"payload_bytes": 2 * ROW_BYTES - 4}, "32, the length of the payload"),
        ("payload", {"payload": bytes(ROW_BYTES)}, "32 bytes: 2 rows of 4 float32"),
        ("payload", {"payload": bytes(2 * ROW_BYTES + 1)}, "32 bytes"),
        ("payload", {"payload": b""}, "32 bytes"),
    ],
)
def test_a_contradiction_names_its_field(field: str, changes: dict[str, Any], said: str):
    """Each inconsistency raises InvalidRequest that names the field and its valid value."""
    with pytest.raises(InvalidRequest) as refused:
        parse(**changes)
    assert refused.value.field == field
    assert said in str(refused.value)


def test_a_call_whose_answer_would_not_fit_into_a_message_is_refused():
    """The bound is on the rows of the answer, which may be top-k times those of the call."""
    shape = fake_shape(experts=6, top_k=6, hidden=1 << 18)  # rows of 1 MiB
    rows = 11
    header = ForwardRequest(
        rows=rows, dtype="float32", k_offsets=int32(*range(0, 6 * rows + 1, 6)), experts=int32(*range(6)) * rows
    )
    with pytest.raises(InvalidRequest, match=r"assignments = 66: must be at most 63, .*: split the call"):
        parse_call(header, memoryview(bytearray(rows << 20)), shape=shape, dtype="float32")
