"""Multiplies by plain weights, whose tiles Hopper's tensor memory accelerator fetches by descriptors.

One thread requests a whole tile, which leaves registers and instructions to the product. But a descriptor must be written
for each tile's expert, which adds about a microsecond of latency. The alternative is to load each value from its address.
`bench --tune` measures which is faster. TABLE in `tiles.py`, which is not tuned yet, uses addresses. Quantised, transposed
or unaligned weights are always loaded from addresses.

Shape legend: R rows sorted by expert, K input features of the product, N output columns of a tile's matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moiety_kernels.gpu.numbers import multiplied
from moiety_kernels.gpu.operand import KINDS, Operand


@triton.jit
def described_product(
    X,
    x_rows,
    row,
    x_height,
    x_stride,
    W,
    STARTS,
    expert,
    column,
    stride_n: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GATHERED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiplies rows of X by one expert's plain matrix, fetched by descriptors: float32 [BM, BN], or [BM, 2 BN] when GATED.

    As in `product.product` with the matrix rows of `product.matrix_rows`, gate and up of a column are adjacent. The BM
    rows of X start at `row`; the last of them may belong to another expert. When GATHERED, the rows of X are instead
    `x_rows`, loaded from their addresses. Values past the end of a matrix read as zeros.
    """
    TWO: tl.constexpr = GATED and not INTERLEAVED  # gate and up lie apart: one product each
    HEIGHT: tl.constexpr = 2 * N if GATED else N
    TALL: tl.constexpr = 2 * BN if GATED and INTERLEAVED else BN
    first = 2 * column if GATED and INTERLEAVED else column
    base = W + tl.multiple_of(tl.load(STARTS + expert), 16)
    weights = tl.make_tensor_descriptor(base, shape=[HEIGHT, K], strides=[stride_n, 1], block_shape=[TALL, BK])
    if GATHERED:
        x_at = X + x_rows.to(tl.int64)[:, None] * x_stride
    else:
        x_tiles = tl.make_tensor_descriptor(X, shape=[x_height, K], strides=[x_stride, 1], block_shape=[BM, BK])
    total = tl.zeros((BM, TALL), tl.float32)
    second = tl.zeros((BM, TALL), tl.float32)
    for k in range(0, K, BK):
        if GATHERED:
            inside = (k + tl.arange(0, BK)) < K
            x = tl.load(x_at + (k + tl.arange(0, BK))[None, :], mask=inside[None, :], other=0.0)
        else:
            x = x_tiles.load([row, k])
        total = multiplied(x, tl.trans(weights.load([first, k])), total, False)
        if TWO:
            second = multiplied(x, tl.trans(weights.load([N + first, k])), second, False)
    if TWO:
        total = tl.join(total, second).reshape(BM, 2 * BN)
    return total


def describable(x: torch.Tensor, matrices: Operand) -> bool:
    """Whether tiles of `x` and `matrices` can be fetched by descriptors with this version of Triton.

    That needs plain weights of x's dtype, K innermost, and all rows aligned to 16 bytes.
    """
    plain = KINDS[matrices.kind] == "plain" and matrices.codes.dtype == x.dtype and matrices.strides[1] == 1
    size = x.element_size()
    on_16_bytes = matrices.aligned and not (x.stride(0) * size | matrices.strides[0] * size) % 16
    return plain and on_16_bytes and hasattr(tl, "make_tensor_descriptor")


def allow_scratch(device: torch.device) -> None:
    """Lets Triton allocate memory on `device` for the descriptors that kernels launched by this thread write."""

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
