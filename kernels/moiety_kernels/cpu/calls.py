"""The arguments of the C++ functions: each takes a pointer to one of these structs. `calls.h` explains the fields.

The fields have the order of `calls.h`. ctypes does not check it, so `library.py` compares the sizes when it loads the library.
With `__slots__`, a name that is no field raises AttributeError.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from typing import Any


def _fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    """Returns the fields `names`, which are separated by spaces, all of the ctypes type `kind`."""
    return tuple((name, kind) for name in names.split())


class AttentionCall(Structure):
    """One call of paged attention."""

    __slots__ = ()
    _fields_ = (
        *_fields(c_void_p, "query keys values output tables sequence length sinks bias"),
        *_fields(c_int64, "biases query_token query_head key_block key_group key_position"),
        *_fields(c_int64, "value_block value_group value_position table_row"),
        *_fields(c_int64, "tokens heads groups key_width value_width page window chunk element_bytes threads"),
        *_fields(c_float, "scale softcap"),
    )


class StoreCall(Structure):
    """Rows to copy into a paged pool."""

    __slots__ = ()
    _fields_ = (
        *_fields(c_void_p, "pool rows slots"),
        *_fields(c_int64, "block group position row_token row_group tokens groups bytes page"),
    )


class ExpertsCall(Structure):
    """One batch of experts."""

    __slots__ = ()
    _fields_ = (
        ("rows", c_void_p),
        ("counts", POINTER(c_int64)),
        ("tensors", c_void_p),
        ("out", c_void_p),
        *_fields(c_int64, "row_stride experts hidden intermediate gate_up_group down_group"),
        *_fields(c_int64, "activation gated interleaved threads"),
        *_fields(c_float, "limit alpha"),
    )


class LinearCall(Structure):
    """One linear layer."""

    __slots__ = ()
    _fields_ = (
        *_fields(c_void_p, "x weight bias out"),
        *_fields(c_int64, "x_stride weight_stride rows depth width threads"),
    )


class NormCall(Structure):
    """One RMS normalisation."""

    __slots__ = ()
    _fields_ = (
        *_fields(c_void_p, "x weight out"),
        *_fields(c_int64, "x_stride rows depth late"),
        *_fields(c_float, "epsilon offset"),
    )


CALLS = (AttentionCall, StoreCall, ExpertsCall, LinearCall, NormCall)  # in the order of `moiety_call_bytes`
