"""y = x W^T + b on CPU: the matrix products of a decode step, at memory speed.

Shape legend: R rows, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from moiety_kernels.cpu.calls import LinearCall
from moiety_kernels.cpu.library import load
from moiety_kernels.threads import thread_limit

# Above this many rows torch's packed GEMM is faster in float32, and in bfloat16 where the C++ kernel uses torch's instruction
# (AMD EPYC of 2024, one core, 256 rows of 1024 x 1024: torch 1.2 ms, C++ 1.45). Elsewhere torch was not faster in bfloat16.
PACKED_ROWS = 64
FIXED_ROWS = 8  # rows of a deterministic tile in torch: a GEMM of one fixed shape sums in one order

_NAMES = {torch.float32: "moiety_linear_f32", torch.bfloat16: "moiety_linear_bf16"}


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, deterministic: bool = False
) -> torch.Tensor:
    """Returns x [R, D] times the transpose of weight [O, D], plus bias [O]: [R, O]. All have one dtype.

    C++ sums in float32. `deterministic`: the bits of an output row depend only on its input row, not on the other rows of
    x. Raises ValueError where the shapes do not match.
    """
    if x.shape[1] != weight.shape[1] or (bias is not None and bias.shape[0] != weight.shape[0]):
        shapes = f"x {list(x.shape)}, weight {list(weight.shape)}, bias {None if bias is None else list(bias.shape)}"
        raise ValueError(f"{shapes}: must be [R, D], [O, D] and [O]")
    kernel = linear_kernel(weight.dtype) if weight.device.type == "cpu" else None
    rows, depth = x.shape
    if kernel is None or x.stride(1) != 1 or weight.stride(1) != 1 or x.dtype != weight.dtype:
        return _fixed_tiles(x, weight, bias) if deterministic else functional.linear(x, weight, bias)
    if (
        rows > PACKED_ROWS
        and not deterministic
        and (weight.dtype == torch.float32 or multiplies_in_pairs(weight.dtype))
    ):
        return functional.linear(x, weight, bias)
    width = weight.shape[0]
    out = x.new_empty(rows, width)
    kernel(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        x_stride=x.stride(0),
        weight_stride=weight.stride(0),
        rows=rows,
        depth=depth,
        width=width,
        threads=thread_limit(),
    )
    return out


def _fixed_tiles(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Computes `linear` in products of FIXED_ROWS rows each, the last one padded with zeros."""
    rows = x.shape[0]
    padded = functional.pad(x, (0, 0, 0, -rows % FIXED_ROWS))
    return torch.cat([functional.linear(tile, weight, bias) for tile in torch.split(padded, FIXED_ROWS)])[:rows]


def linear_kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """Returns the C++ function that computes `linear` in `dtype`; None if there is none."""
    if dtype not in _NAMES or (library := load()) is None:
        return None
    return library.function(f"{_NAMES[dtype]}{'_pairs' if multiplies_in_pairs(dtype) else ''}", LinearCall)


def multiplies_in_pairs(dtype: torch.dtype) -> bool:
    """Whether the C++ kernels multiply pairs of `dtype` values in one instruction (`vdpbf16ps`), as torch does here."""
    return dtype == torch.bfloat16 and (library := load()) is not None and library.pairs
