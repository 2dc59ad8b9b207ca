"""Grouped GEMM: multiplies rows sorted by expert by their expert's matrix, with bias and activation fused.

Shape legend: R rows sorted by expert, E experts, K input features, O rows of a matrix, N output columns (O / 2 gated).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moiety_kernels.gpu.descriptors import allow_scratch, describable, described_product
from moiety_kernels.gpu.numbers import narrowed
from moiety_kernels.gpu.operand import Operand
from moiety_kernels.gpu.product import activate, find_tile, gate_options, matrix_rows, product, tiles_of
from moiety_kernels.gpu.tiles import Tile, choose, fit_to_groups, processors
from moiety_kernels.reference.activation import Activation


@triton.jit
def grouped_gemm_kernel(
    X,
    X_SCALE,
    GATHER,
    OFFSETS,
    W,
    SCALE,
    ZERO,
    BIAS,
    STARTS,
    Y,
    SLOTS,
    x_height,
    x_stride,
    y_stride,
    gather_by,
    stride_n: tl.constexpr,
    stride_k: tl.constexpr,
    scale_stride: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Computes one output tile per program, or several in turn where there are fewer programs than tiles."""
    tiles, ends = tiles_of(OFFSETS, E, E_PAD, BM)
    row_tiles = tl.sum(tiles, 0)
    column_tiles: tl.constexpr = (N + BN - 1) // BN
    for number in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        # BAND row tiles share each strip of weights while it is in the L2 cache.
        band = number // (BAND * column_tiles)
        height = tl.minimum(row_tiles - band * BAND, BAND)
        within = number - band * (BAND * column_tiles)
        column = (within // height) * BN
        expert, row, row_end = find_tile(OFFSETS, tiles, ends, band * BAND + within % height, BM)
        y_rows = row + tl.arange(0, BM)
        inside = y_rows < row_end
        x_rows = tl.minimum(y_rows, row_end - 1)  # spare rows repeat the last row and are not stored
        if GATHER is not None:
            x_rows = tl.load(GATHER + x_rows) // gather_by
        rows = matrix_rows(column, GATED, INTERLEAVED, N, BN)
        if DESCRIBED:
            total = described_product(
                X,
                x_rows,
                row,
                x_height,
                x_stride,
                W,
                STARTS,
                expert,
                column,
                stride_n,
                K,
                N,
                GATED,
                INTERLEAVED,
                GATHER is not None,
                BM,
                BN,
                BK,
            )
        else:
            total = product(
                X,
                x_rows,
                x_stride,
                W,
                SCALE,
                ZERO,
                STARTS,
                expert,
                rows,
                stride_n,
                stride_k,
                scale_stride,
                0,
                K,
                E,
                KIND,
                K,
                BM,
                BK,
                GROUP,
                GROUP_ROWS,
                ALIGNED,
            )
        if X_SCALE is not None:
            total *= tl.load(X_SCALE + x_rows)[:, None]
        if BIAS is not None:
            total += tl.load(BIAS + tl.load(STARTS + 3 * E + expert) + rows).to(tl.float32)[None, :]
        value = activate(total, ACTIVATION, GATED, LIMIT, ALPHA)
        if SLOTS is not None:  # back to [token, k] order
            y_rows = tl.load(SLOTS + y_rows, mask=inside, other=0)
        columns = column + tl.arange(0, BN)
        at = Y + y_rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
        tl.store(at, narrowed(value, Y.dtype.element_ty), mask=inside[:, None] & (columns < N)[None, :])


def grouped_gemm(
    x: torch.Tensor,
    offsets: torch.Tensor,
    matrices: Operand,
    out: torch.Tensor,
    *,
    rows: int,
    activation: Activation | None = None,
    gather: torch.Tensor | None = None,
    gather_by: int = 1,
    slots: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    tile: Tile | None = None,
    programs: int | None = None,
) -> torch.Tensor:
    """Multiplies rows `offsets[e]` to `offsets[e + 1]` of x by expert e's matrix, into `out` [., N], and returns `out`.

    Applies `activation` to the products, if there is one.
    Row `offsets[e + 1]` itself is excluded. x [R, K] is float32, float16, bfloat16, or float8_e4m3fn with one `x_scale`
    (float32) per row. `offsets` (int32 or int64 [E + 1]) stays on the device: the host needs only `rows` (R) to start as
    many programs as there can be tiles. `gather` int32 [R]: row r is `x[gather[r] // gather_by]`. `slots` int32 [R]: row
    r's result goes to `out[slots[r]]`. At most `programs` programs start, and each computes tile after tile; by default
    one per tile, or one per SM if the tile is `persistent`. The order of every sum depends only on K and the tile's depth.
    """
    width, depth = matrices.shape
    gates = gate_options(activation)
    n = width // 2 if gates["GATED"] else width
    # The tile table is for plain weights; quantised weights need a depth that fits their groups.
    tile = fit_to_groups(tile or choose(rows, matrices.experts, depth, x.dtype, gates["GATED"]), matrices)
    bound = (rows // tile.rows + min(matrices.experts, rows)) * triton.cdiv(n, tile.columns)
    if programs is None and tile.persistent:
        programs = processors(x.device)
    described = tile.descriptors and describable(x, matrices)
    if described:
        allow_scratch(x.device)
    if bound:
        grouped_gemm_kernel[(min(bound, programs or bound),)](
            x,
            x_scale,
            gather,
            offsets,
            matrices.codes,
            matrices.scale,
            matrices.zero,
            matrices.bias,
            matrices.offsets,
            out,
            slots,
            x.shape[0],
            x.stride(0),
            out.stride(0),
            gather_by,
            *matrices.strides,
            matrices.scale_stride,
            E=matrices.experts,
            E_PAD=triton.next_power_of_2(matrices.experts),
            N=n,
            K=depth,
            KIND=matrices.kind,
            GROUP=matrices.group,
            GROUP_ROWS=matrices.group_rows,
            ALIGNED=matrices.aligned,
            **gates,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            BAND=tile.band,
            DESCRIBED=described,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return out
