"""Rows in float8_e4m3 for the wire and for fp8 products: one float32 scale per row, or per group of columns.

Quantising and dequantising to float32 changes a value x by at most max(2^-4 |x|, 2^-10 s): half a step of a 3-bit mantissa,
or half of e4m3's finest step, 2^-9. The scale s is the group's largest magnitude over 448, at least 1e-30. float32 rounding
adds 2^-22 |x|. A group with an infinity or NaN becomes NaN throughout; a group of zeros stays zeros.

Shape legend: R rows, D columns, G groups of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moiety_kernels.gpu.numbers import narrowed


@triton.jit
def quantise_kernel(X, CODES, SCALE, x_stride, D: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Quantises one group of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    column = group * GROUP + lane
    inside = (lane < GROUP) & (column < D)
    x = tl.load(X + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.where(tl.abs(x) <= 3.4028234e38, tl.abs(x), float("nan"))  # an infinity counts as NaN
    broken = tl.sum((magnitude != magnitude).to(tl.int32), 0) > 0
    largest = tl.max(tl.where(magnitude == magnitude, magnitude, 0.0), 0)
    scale = tl.maximum(largest * (1.0 / 448.0), 1e-30)  # for a group of zeros: avoids a division by 0
    x = tl.where(magnitude == magnitude, x, 0.0)
    value = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    tl.store(CODES + row * D + column, narrowed(value, tl.float8e4nv), mask=inside)
    tl.store(SCALE + row * tl.num_programs(1) + group, tl.where(broken, float("nan"), scale))


@triton.jit
def dequantise_kernel(CODES, SCALE, OUT, D: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Dequantises one group of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    column = group * GROUP + lane
    inside = (lane < GROUP) & (column < D)
    scale = tl.load(SCALE + row * tl.num_programs(1) + group)
    value = tl.load(CODES + row * D + column, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(OUT + row * D + column, narrowed(value, OUT.dtype.element_ty), mask=inside)


def quantise_rows(x: torch.Tensor, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises x [R, D] to float8_e4m3fn [R, D] and float32 scales [R, G], one per `group` columns; by default one per row."""
    rows, columns = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    group = group or columns
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, triton.cdiv(columns, group), dtype=torch.float32, device=x.device)
    if rows:
        width = triton.next_power_of_2(group)
        quantise_kernel[tuple(scale.shape)](x, codes, scale, x.stride(0), D=columns, GROUP=group, WIDTH=width)
    return codes, scale


def dequantise_rows(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, group: int | None = None
) -> torch.Tensor:
    """Returns codes * scale [R, D], rounded to `dtype`; `group` must be the one given to `quantise_rows`."""
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    group = group or columns
    if rows:
        width = triton.next_power_of_2(group)
        dequantise_kernel[tuple(scale.shape)](codes, scale, out, D=columns, GROUP=group, WIDTH=width)
    return out
