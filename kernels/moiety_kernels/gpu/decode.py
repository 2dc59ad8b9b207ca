"""Grouped GEMM for few rows: each sum over K is split among programs, and a second kernel adds the parts in order.

A decode step multiplies few rows by whole matrices. If enough programs read the weights, its time is the weights' bytes
divided by the memory bandwidth. K is split where one program per tile would not occupy the device (`tiles.split_count`).
No sum uses atomics.

Shape legend: R rows sorted by expert, E experts, K input features, N output columns, S parts of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moiety_kernels.gpu.grouped_gemm import grouped_gemm
from moiety_kernels.gpu.numbers import narrowed
from moiety_kernels.gpu.operand import Operand
from moiety_kernels.gpu.product import activate, find_tile, gate_options, matrix_rows, product, tiles_of
from moiety_kernels.gpu.tiles import Tile, choose, fit_to_groups, split_count
from moiety_kernels.reference.activation import Activation


@triton.jit
def split_kernel(
    X,
    GATHER,
    OFFSETS,
    W,
    SCALE,
    ZERO,
    STARTS,
    PARTIAL,
    x_stride,
    gather_by,
    part_stride,
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
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Stores an output tile's sums over one part of K (DEPTH columns) in PARTIAL [S, R, N]; [S, R, 2N] when GATED.

    When GATED, columns 2n and 2n + 1 of PARTIAL hold the gate and up of output column n.
    """
    tiles, ends = tiles_of(OFFSETS, E, E_PAD, BM)
    tile = tl.program_id(1)
    if tile < tl.sum(tiles, 0):
        column = tl.program_id(0) * BN
        part = tl.program_id(2)
        expert, row, row_end = find_tile(OFFSETS, tiles, ends, tile, BM)
        y_rows = row + tl.arange(0, BM)
        x_rows = tl.minimum(y_rows, row_end - 1)
        if GATHER is not None:
            x_rows = tl.load(GATHER + x_rows) // gather_by
        total = product(
            X,
            x_rows,
            x_stride,
            W,
            SCALE,
            ZERO,
            STARTS,
            expert,
            matrix_rows(column, GATED, INTERLEAVED, N, BN),
            stride_n,
            stride_k,
            scale_stride,
            part * DEPTH,
            tl.minimum((part + 1) * DEPTH, K),
            E,
            KIND,
            K,
            BM,
            BK,
            GROUP,
            GROUP_ROWS,
            ALIGNED,
        )
        width: tl.constexpr = 2 if GATED else 1
        columns = column * width + tl.arange(0, BN * width)
        at = PARTIAL + part * part_stride + y_rows[:, None] * (N * width) + columns[None, :]
        tl.store(at, total, mask=(y_rows < row_end)[:, None] & (columns < N * width)[None, :])


@triton.jit
def finish_kernel(
    PARTIAL,
    X_SCALE,
    GATHER,
    OFFSETS,
    BIAS,
    STARTS,
    Y,
    SLOTS,
    y_stride,
    gather_by,
    part_stride,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds one row's sums over the parts of K in order, then applies scale, bias and activation as `grouped_gemm` does."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BN
    if row < tl.load(OFFSETS + E):
        experts = tl.arange(0, E_PAD)
        expert = tl.sum((tl.load(OFFSETS + 1 + experts, mask=experts < E, other=1 << 30) <= row).to(tl.int32), 0)
        width: tl.constexpr = 2 if GATED else 1
        columns = column * width + tl.arange(0, BN * width)
        at = PARTIAL + row * (N * width) + columns
        total = tl.zeros((BN * width,), tl.float32)
        for part in tl.static_range(PARTS):
            total += tl.load(at + part * part_stride, mask=columns < N * width, other=0.0)
        if X_SCALE is not None:
            source = row
            if GATHER is not None:
                source = tl.load(GATHER + row) // gather_by
            total *= tl.load(X_SCALE + source)
        if BIAS is not None:
            rows = matrix_rows(column, GATED, INTERLEAVED, N, BN)
            total += tl.load(BIAS + tl.load(STARTS + 3 * E + expert) + rows).to(tl.float32)
        value = activate(total[None, :], ACTIVATION, GATED, LIMIT, ALPHA).reshape(BN)
        if SLOTS is not None:
            row = tl.load(SLOTS + row)
        columns = column + tl.arange(0, BN)
        tl.store(Y + row.to(tl.int64) * y_stride + columns, narrowed(value, Y.dtype.element_ty), mask=columns < N)


def decode_gemm(
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
    split: int | None = None,
) -> torch.Tensor:
    """Computes what `grouped_gemm` does, with K split into at most `split` parts, by default `tiles.split_count`.

    If K has only one part, or there are no rows, this calls `grouped_gemm`.
    """
    width, depth = matrices.shape
    gates = gate_options(activation)
    n = width // 2 if gates["GATED"] else width
    tile = fit_to_groups(tile or choose(rows, matrices.experts, depth, x.dtype, gates["GATED"]), matrices)
    split = split or split_count(tile, rows, matrices.experts, n, depth, x.device)
    part_depth = triton.cdiv(triton.cdiv(depth, tile.depth), split) * tile.depth  # columns of K per part
    split = triton.cdiv(depth, part_depth)
    if split == 1 or not rows:
        return grouped_gemm(
            x,
            offsets,
            matrices,
            out,
            rows=rows,
            activation=activation,
            gather=gather,
            gather_by=gather_by,
            slots=slots,
            x_scale=x_scale,
            tile=tile,
        )
    partial = torch.empty(split, rows, width, dtype=torch.float32, device=x.device)
    row_tiles = rows // tile.rows + min(matrices.experts, rows)
    shared = {"E": matrices.experts, "E_PAD": triton.next_power_of_2(matrices.experts), "N": n}
    split_kernel[(triton.cdiv(n, tile.columns), row_tiles, split)](
        x,
        gather,
        offsets,
        matrices.codes,
        matrices.scale,
        matrices.zero,
        matrices.offsets,
        partial,
        x.stride(0),
        gather_by,
        partial.stride(0),
        *matrices.strides,
        matrices.scale_stride,
        **shared,
        K=depth,
        KIND=matrices.kind,
        GROUP=matrices.group,
        GROUP_ROWS=matrices.group_rows,
        ALIGNED=matrices.aligned,
        GATED=gates["GATED"],
        INTERLEAVED=gates["INTERLEAVED"],
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        DEPTH=part_depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    finish = min(512, triton.next_power_of_2(n))  # columns per program, untuned
    finish_kernel[(rows, triton.cdiv(n, finish))](
        partial,
        x_scale,
        gather,
        offsets,
        matrices.bias,
        matrices.offsets,
        out,
        slots,
        out.stride(0),
        gather_by,
        partial.stride(0),
        **shared,
        **gates,
        PARTS=split,
        BN=finish,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
