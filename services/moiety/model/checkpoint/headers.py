"""Reads the header of one safetensors file and checks it against the file's size.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian length, JSON, then the tensors' bytes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moiety.errors import CheckpointError
from moiety.model.checkpoint.files import damage, parsed, unreadable

MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
ITEM_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The location of one tensor: row-major bytes [start, end) of `file`; `dtype` is safetensors' name (BF16, F32, …)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Reads the header of the safetensors file `file`: returns each tensor's location by the tensor's name.

    Raises CheckpointError if the header is damaged or describes more bytes than the file has.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(file, f"{size} bytes cannot hold the safetensors header it declares")
            header = parsed(stream.read(length), once=True)
    except OSError as error:
        raise CheckpointError(f"{file}: {unreadable(error)}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its safetensors header is not readable as JSON: {damage(error)}") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its safetensors header is not a JSON object")
    entries = {
        name: _entry(file, name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"
    }
    needed = max((entry.end for entry in entries.values()), default=0)
    if needed > size:
        raise CheckpointError(f"{file}: truncated: it has {size} bytes, its header describes {needed}: {AGAIN}")
    return entries


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: damaged: {what}: {AGAIN}")


def _entry(file: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (first, last) = str(fields["dtype"]), tuple(fields["shape"]), fields["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"tensor {name} has no dtype, shape and data_offsets") from error
    if dtype not in ITEM_BITS:
        raise CheckpointError(
            f"{file}: tensor {name} has the unknown dtype {dtype}: must be one of {', '.join(ITEM_BITS)}"
        )
    counts = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    if not counts or 8 * (last - first) != prod(shape) * ITEM_BITS[dtype]:
        raise _damaged(file, f"tensor {name} {dtype}{list(shape)} does not fit its data_offsets")
    return TensorEntry(file, dtype, shape, data_start + first, data_start + last)
