"""y = x W^T + b on CPU: the matrix products of a decode step, at memory speed and independent of the batch.

Shape legend: R rows, D input features, O output features.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from moiety_kernels.cpu.library import BF16, load

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURE = (_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, ctypes.c_int)


@functools.cache
def linear_kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """The C++ function for this dtype, where there is one."""
    if (library := load()) is None:
        return None
    if dtype == torch.float32:
        return library.function("moiety_linear_f32", *_SIGNATURE)
    if dtype == torch.bfloat16:
        return library.function("moiety_linear_bf16", *_SIGNATURE, isa=BF16)
    return None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [R, D] times weight [O, D] plus bias [O]: [R, O], all of one dtype, sums in float32."""
    kernel = linear_kernel(weight.dtype)
    if kernel is None or x.stride(1) != 1 or weight.stride(1) != 1:
        return functional.linear(x, weight, bias)
    rows, depth = x.shape
    width = weight.shape[0]
    out = x.new_empty(rows, width)
    kernel(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        depth,
        width,
        torch.get_num_threads(),
    )
    return out
