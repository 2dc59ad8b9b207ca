"""Frames of the Forward stream: protobuf messages whose payload bypasses protobuf.

A frame is an ordinary serialised message, so any gRPC client can send and read it. Its first field is `payload_bytes`, its
last is `payload`. So `encode` appends the payload to the serialised header, and `decode` returns a view of the frame's end.
protobuf itself would copy the payload, which may be megabytes.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import numpy as np
import torch
from google.protobuf.message import DecodeError

from moiety.errors import InvalidRequest
from moiety.internal.v1.experts_pb2 import ForwardRequest, ForwardResponse
from moiety.wire.rows import RowBuffer

Header = TypeVar("Header", ForwardRequest, ForwardResponse)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_PAYLOAD_BYTES_TAG = 0x0D  # field 1, fixed32
_PAYLOAD_TAG = 0x7A  # field 15, length-delimited


def torch_dtype(setting: str, published: str) -> torch.dtype:
    """Returns the torch dtype that the setting `dtype` names; `auto` names the checkpoint's own dtype, `published`."""
    return DTYPES[published if setting == "auto" else setting]


def encode(header: Header, payload: RowBuffer | None = None) -> bytes:
    """Returns one frame: `header`, whose `payload` field is unset, followed by the rows of `payload`."""
    if payload is None or payload.nbytes == 0:
        header.payload_bytes = 0
        return header.SerializeToString()
    header.payload_bytes = payload.nbytes
    body = payload.host.view(np.uint8).data
    return b"".join((header.SerializeToString(), _payload_prefix(payload.nbytes), body))


def decode(kind: type[Header], frame: bytes) -> tuple[Header, memoryview]:
    """Returns a frame's header and its payload, which is a view of `frame` if `encode` wrote the frame.

    Raises InvalidRequest if `frame` is not a message of the type `kind`.
    """
    try:
        if len(frame) > 5 and frame[0] == _PAYLOAD_BYTES_TAG:
            size = struct.unpack_from("<I", frame, 1)[0]
            prefix = _payload_prefix(size) if size else b""
            end = len(frame) - size
            start = end - len(prefix)
            if start >= 5 and frame[start:end] == prefix:
                header = kind.FromString(frame[:start])
                if not header.payload:
                    return header, memoryview(frame)[end:]
        header = kind.FromString(frame)  # other protobuf libraries may write the fields in another order
    except DecodeError as error:
        raise InvalidRequest("frame", f"{len(frame)} bytes", f"a {kind.DESCRIPTOR.name}: {error}") from None
    return header, memoryview(header.payload)


def int32_bytes(values: np.ndarray) -> bytes:
    """Returns `values` as little-endian int32, the format of ForwardRequest's `k_offsets` and `experts`."""
    return values.astype("<i4", copy=False).tobytes()


def int32_array(data: bytes) -> np.ndarray:
    """Returns the int32 array that `int32_bytes` encoded: read-only, without a copy."""
    return np.frombuffer(data, dtype="<i4")


def _payload_prefix(size: int) -> bytes:
    out = bytearray([_PAYLOAD_TAG])
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)
