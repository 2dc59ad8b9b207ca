"""Sums a token's K expert outputs in float32, in order of k, wherever the experts are placed.

Shape legend: T tokens, K experts per token, D hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moiety_kernels.gpu.numbers import narrowed


@triton.jit
def combine_kernel(
    ROWS, WEIGHTS, PRESENT, OUT, E: tl.constexpr, D: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr
):
    """Sums WIDTH columns of one token's expert outputs."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for k in tl.static_range(TOP_K):
        end = D
        if PRESENT is not None:
            expert = tl.load(PRESENT + token * TOP_K + k)
            end = tl.where((expert >= 0) & (expert < E), D, 0)
        value = tl.load(ROWS + (token * TOP_K + k) * D + column, mask=column < end, other=0.0).to(tl.float32)
        if WEIGHTS is not None:
            value *= tl.load(WEIGHTS + token * TOP_K + k).to(tl.float32)
        total += value
    tl.store(OUT + token * D + column, narrowed(total, OUT.dtype.element_ty), mask=column < D)


def combine(
    rows: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    present: torch.Tensor | None = None,
    experts: int = 0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Multiplies contiguous `rows` [T, K, D] by `weights` [T, K], if given, and returns their sums over K [T, D].

    The result has `dtype`, by default that of the rows. `present` [T, K] holds the expert index of each row. A row whose
    index is outside [0, `experts`) is not read and adds nothing.
    """
    tokens, top_k, hidden = rows.shape
    weights = None if weights is None else weights.contiguous()
    present = None if present is None else present.contiguous()
    out = torch.empty(tokens, hidden, dtype=dtype or rows.dtype, device=rows.device)
    width = min(1024, triton.next_power_of_2(hidden))
    if tokens:
        grid = (tokens, triton.cdiv(hidden, width))
        combine_kernel[grid](
            rows, weights, present, out, E=experts, D=hidden, TOP_K=top_k, WIDTH=width, enable_fp_fusion=False
        )
    return out
