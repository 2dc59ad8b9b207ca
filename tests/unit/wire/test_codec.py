"""Frames survive a round trip, other protobuf libraries read and write them, and invalid bytes are refused."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.errors import InvalidRequest
from moiety.internal.v1.experts_pb2 import OUTCOME_NOT_HELD, ForwardRequest, ForwardResponse
from moiety.wire import codec
from moiety.wire.rows import RowBuffer, copy_rows

ROW_BYTES = 24


def header() -> ForwardRequest:
    """A request with every field but the payload."""
    return ForwardRequest(
        call_id=7, attempt=2, system_key="k", layer=3, rows=2, dtype="float32", k_offsets=b"k" * 12, experts=b"e" * 8
    )


def rows(count: int) -> RowBuffer:
    """`count` rows of distinct bytes."""
    data = (np.arange(count * ROW_BYTES) % 251).astype(np.uint8)
    return RowBuffer.within(memoryview(data.tobytes()), ROW_BYTES)


@pytest.mark.parametrize("dtype", codec.DTYPES.values(), ids=codec.DTYPES)
@pytest.mark.parametrize("count", [0, 1, 5, 400])  # no row; one; a length prefix of one byte, and of three
def test_rows_survive_the_wire_to_the_bit(dtype: torch.dtype, count: int):
    """Rows of every dtype come back bit for bit, NaN payloads included, and the header beside them."""
    sent = torch.randn(count, 12, generator=torch.Generator().manual_seed(count)).to(dtype)
    if count:
        sent[0, 0] = torch.nan
    frame = codec.encode(header(), RowBuffer.of(sent))
    decoded, payload = codec.decode(ForwardRequest, frame)
    got = torch.empty_like(sent)
    copy_rows(RowBuffer.within(payload, 12 * dtype.itemsize), RowBuffer.of(got))
    assert torch.equal(got.view(torch.uint8), sent.view(torch.uint8))
    assert (decoded.call_id, decoded.attempt, decoded.layer, decoded.system_key) == (7, 2, 3, "k")
    assert not decoded.payload, "the payload must not be copied out of the frame"


@pytest.mark.parametrize("count", [0, 1, 400])
def test_plain_protobuf_reads_our_frames(count: int):
    """A client without our codec parses a frame as the message it is."""
    message = ForwardRequest.FromString(codec.encode(header(), rows(count)))
    assert message.payload == rows(count).host.tobytes()
    assert message.payload_bytes == len(message.payload)
    assert message.k_offsets == b"k" * 12


@pytest.mark.parametrize("size", [None, 0, "right"], ids=["no payload_bytes", "zero", "right"])
@pytest.mark.parametrize("payload", [b"", b"p" * 300])
def test_we_read_plain_protobuf(size: object, payload: bytes):
    """A message of any protobuf library is read, whether or not it sets payload_bytes."""
    message = header()
    message.payload = payload
    if size is not None:
        message.payload_bytes = len(payload) if size == "right" else 0
    got, view = codec.decode(ForwardRequest, message.SerializeToString())
    assert bytes(view) == payload
    assert got.call_id == 7


def test_the_order_of_fields_is_free():
    """Protobuf guarantees no order: a payload before the other fields is found too."""
    payload = ForwardRequest(payload=b"p" * 300).SerializeToString()
    size = ForwardRequest(payload_bytes=300).SerializeToString()
    rest = header().SerializeToString()
    for frame in (payload + size + rest, size + payload + rest, rest + payload + size):
        got, view = codec.decode(ForwardRequest, frame)
        assert bytes(view) == b"p" * 300
        assert (got.call_id, got.k_offsets) == (7, b"k" * 12)


@given(lie=st.integers(0, 2**32 - 1), payload=st.binary(max_size=300))
def test_a_wrong_payload_bytes_never_moves_the_payload(lie: int, payload: bytes):
    """payload_bytes is a hint: where it is wrong, protobuf's own payload is read, or the frame is refused."""
    message = header()
    message.payload, message.payload_bytes = payload, lie
    with suppress(InvalidRequest):
        _, view = codec.decode(ForwardRequest, message.SerializeToString())
        assert bytes(view) == payload


def test_every_truncation_is_refused_or_harmless():
    """A frame cut at any byte raises InvalidRequest or has no payload; decode raises nothing else."""
    frame = codec.encode(header(), rows(2))
    for cut in range(len(frame)):
        with suppress(InvalidRequest):
            _, view = codec.decode(ForwardRequest, frame[:cut])
            assert len(view) == 0, "a part of a payload was accepted as a whole one"


@given(garbage=st.binary(max_size=80))
def test_garbage_raises_invalid_request_or_parses(garbage: bytes):
    """For any bytes, decode returns a message or raises InvalidRequest."""
    with suppress(InvalidRequest):
        codec.decode(ForwardResponse, garbage)


def test_invalid_bytes_are_named_in_the_error():
    """The error names the expected message and the size of the frame."""
    with pytest.raises(InvalidRequest, match="frame = '3 bytes': must be a ForwardRequest") as refused:
        codec.decode(ForwardRequest, b"\xff\xff\xff")
    assert refused.value.field == "frame"


def test_a_reply_without_rows_is_an_ordinary_message():
    """A refusal is a frame with an empty payload."""
    frame = codec.encode(ForwardResponse(call_id=1, outcome=OUTCOME_NOT_HELD, detail="no"))
    got, view = codec.decode(ForwardResponse, frame)
    assert (got.outcome, got.detail, len(view)) == (OUTCOME_NOT_HELD, "no", 0)
