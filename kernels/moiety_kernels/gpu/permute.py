"""Sorts rows by expert from top-k indices: a stable counting sort on the device, for which the host does not wait.

Shape legend: T tokens, K experts per token, A = T K assignments, E experts, B blocks of assignments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 128  # assignments per program, ranked by BLOCK x BLOCK comparisons, 64 per thread; untuned


@dataclass(frozen=True, slots=True)
class Permutation:
    """The order of assignments after a stable sort by expert; assignments to experts on other devices come last."""

    offsets: torch.Tensor  # int32 [E + 1]: the first row of each expert; the last entry counts the rows with an expert
    order: torch.Tensor  # int32 [A]: the assignment at each sorted position
    position: torch.Tensor  # int32 [A]: the sorted position of each assignment


@triton.jit
def _experts(INDEX, at, A, E: tl.constexpr):
    """Returns the expert of each assignment in `at`: E if that expert is on another device, -1 past the last assignment."""
    index = tl.load(INDEX + at, mask=at < A, other=-1).to(tl.int32)
    return tl.where((at < A) & ((index < 0) | (index >= E)), E, index)


@triton.jit
def count_kernel(INDEX, COUNTS, A, blocks, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Counts a block's assignments per expert in COUNTS [E_PAD, B]; row E counts those to other devices."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    counts = tl.histogram(_experts(INDEX, at, A, E), E_PAD, at < A)
    tl.store(COUNTS + tl.arange(0, E_PAD) * blocks + block, counts)


@triton.jit
def scan_kernel(COUNTS, TOTALS, blocks, B_PAD: tl.constexpr):
    """Replaces each of one expert's COUNTS by the sum over earlier blocks, and stores the sum over all blocks in TOTALS."""
    expert = tl.program_id(0)
    block = tl.arange(0, B_PAD)
    counts = tl.load(COUNTS + expert * blocks + block, mask=block < blocks, other=0)
    tl.store(COUNTS + expert * blocks + block, tl.cumsum(counts, 0) - counts, mask=block < blocks)
    tl.store(TOTALS + expert, tl.sum(counts, 0))


@triton.jit
def place_kernel(
    INDEX,
    COUNTS,
    TOTALS,
    OFFSETS,
    ORDER,
    POSITION,
    A,
    blocks,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Stores each assignment's sorted position: the first row of its expert plus its rank among that expert's assignments.

    Also stores the assignment at each sorted position in ORDER, and each expert's first row in OFFSETS. ALONE: there is
    only one block.
    """
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    at = block * BLOCK + lane
    inside = at < A
    index = _experts(INDEX, at, A, E)
    experts = tl.arange(0, E_PAD)
    if ALONE:
        totals = tl.histogram(index, E_PAD, inside)
    else:
        totals = tl.load(TOTALS + experts)
    first = tl.cumsum(totals, 0) - totals
    if block == 0:
        tl.store(OFFSETS + experts, first, mask=experts <= E)
    # Earlier assignments of the same expert in this block: the experts as a column, compared with them as a row.
    row = _experts(INDEX, block * BLOCK + tl.arange(0, BLOCK), A, E)
    same = (index[:, None] == row[None, :]) & (lane[:, None] > tl.arange(0, BLOCK)[None, :])
    index = tl.maximum(index, 0)
    position = tl.sum(same.to(tl.int32), 1) + tl.gather(first, index, 0)
    if not ALONE:
        position += tl.load(COUNTS + index * blocks + block)
    tl.store(POSITION + at, position, mask=inside)
    tl.store(ORDER + position, at, mask=inside)


def sort_by_expert(top_k_index: torch.Tensor, experts: int) -> Permutation:
    """Sorts `top_k_index` [T, K] (any integer dtype, contiguous) by expert: one launch up to 128 assignments, else three.

    An index outside [0, `experts`) is an expert on another device. Its assignments are sorted after all others and start
    at `offsets[experts]`.
    """
    index = top_k_index.reshape(-1)
    total = index.numel()
    device = index.device
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    order, position = torch.empty(2, total, dtype=torch.int32, device=device)
    blocks, padded = max(1, triton.cdiv(total, BLOCK)), triton.next_power_of_2(experts + 1)
    counts = totals = None
    if blocks > 1:
        counts = torch.empty(padded, blocks, dtype=torch.int32, device=device)
        totals = torch.empty(padded, dtype=torch.int32, device=device)
        count_kernel[(blocks,)](index, counts, total, blocks, E=experts, E_PAD=padded, BLOCK=BLOCK)
        scan_kernel[(padded,)](counts, totals, blocks, B_PAD=triton.next_power_of_2(blocks))
    place_kernel[(blocks,)](
        index,
        counts,
        totals,
        offsets,
        order,
        position,
        total,
        blocks,
        E=experts,
        E_PAD=padded,
        BLOCK=BLOCK,
        ALONE=blocks == 1,
        num_warps=8,
    )
    return Permutation(offsets, order, position)


@triton.jit
def gather_kernel(X, FROM, Y, x_stride, D: tl.constexpr, BY: tl.constexpr, WIDTH: tl.constexpr):
    """Copies rows: Y[row] = X[FROM[row] // BY]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    source = (tl.load(FROM + row) // BY).to(tl.int64)
    value = tl.load(X + source * x_stride + column, mask=column < D)
    tl.store(Y + row * D + column, value, mask=column < D)


def _gathered(x: torch.Tensor, indices: torch.Tensor, by: int) -> torch.Tensor:
    """Returns the rows `x[indices // by]`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(indices.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    width = min(1024, triton.next_power_of_2(x.shape[1]))
    if indices.shape[0]:
        grid = (indices.shape[0], triton.cdiv(x.shape[1], width))
        gather_kernel[grid](x, indices, out, x.stride(0), D=x.shape[1], BY=by, WIDTH=width)
    return out


def permute(x: torch.Tensor, permutation: Permutation, top_k: int) -> torch.Tensor:
    """Copies the row in x [T, D] of each assignment's token; returns the rows [A, D] sorted by expert."""
    return _gathered(x, permutation.order, top_k)


def unpermute(rows: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """Returns `rows` [A, D], which are sorted by expert, in the order of assignments. For K = 1 this undoes `permute`."""
    return _gathered(rows, permutation.position, 1)
