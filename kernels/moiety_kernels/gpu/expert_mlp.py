"""Experts' MLPs on a GPU: two grouped products over rows sorted by expert, or a whole MoE block after gating.

Shape legend: T tokens, K experts per token, R rows sorted by expert (T K), E experts, D hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moiety_kernels.gpu.combine import combine
from moiety_kernels.gpu.decode import decode_gemm
from moiety_kernels.gpu.grouped_gemm import grouped_gemm
from moiety_kernels.gpu.operand import Operand
from moiety_kernels.gpu.permute import Permutation, sort_by_expert
from moiety_kernels.gpu.tiles import DECODE_ROWS, FIXED, FLOAT32
from moiety_kernels.reference.activation import SWIGLU, Activation


@dataclass(frozen=True, slots=True)
class ExpertOperands:
    """The matrices of E experts and the activation between them."""

    gate_up: Operand  # [O, D] each, O = 2I when gated, else I
    down: Operand  # [D, I] each
    activation: Activation = SWIGLU


def sorted_expert_mlp(
    x: torch.Tensor,
    offsets: torch.Tensor,
    experts: ExpertOperands,
    *,
    rows: int | None = None,
    dtype: torch.dtype | None = None,
    x_scale: torch.Tensor | None = None,
    gather: torch.Tensor | None = None,
    gather_by: int = 1,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Runs the rows of x [R, D], sorted by expert, through their experts; returns unweighted outputs [R, D].

    `offsets` [E + 1]: expert e's rows start at `offsets[e]` and end before `offsets[e + 1]`. `gather` chooses the rows of
    x, and `slots` places the outputs (see `grouped_gemm`). Sums, bias and activation are float32. The result of the
    activation is rounded to `dtype` (by default x's). The output has `dtype` too, unless `out` is given. `deterministic`:
    the bits of an output row depend only on its input row and expert. The host does not wait for the device. fp8 rows
    need `x_scale` and `dtype`.
    """
    rows = x.shape[0] if rows is None else rows
    x = x if x.stride(1) == 1 else x.contiguous()
    dtype = dtype or x.dtype
    inner = torch.empty(rows, experts.down.shape[1], dtype=dtype, device=x.device)
    if out is None:
        out = torch.empty(rows, experts.down.shape[0], dtype=dtype, device=x.device)
    tile = (FLOAT32 if dtype == torch.float32 else FIXED) if deterministic else None
    few = not deterministic and rows <= DECODE_ROWS * min(experts.gate_up.experts, rows)
    gemm = decode_gemm if few else grouped_gemm
    gemm(
        x,
        offsets,
        experts.gate_up,
        inner,
        rows=rows,
        activation=experts.activation,
        gather=gather,
        gather_by=gather_by,
        x_scale=x_scale,
        tile=tile,
    )
    return gemm(inner, offsets, experts.down, out, rows=rows, slots=slots, tile=tile)


def moe(
    x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, experts: ExpertOperands
) -> torch.Tensor:
    """Computes a whole MoE block after gating: returns the weighted sums [T, D] of the expert outputs for x [T, D].

    `top_k_index` [T, K] chooses each token's experts. Rows are not gathered in memory: the first product reads each
    token's row in place, and the second writes its result to the slot of that token and k. Then the K slots of each token
    are weighted and summed in order of k, in float32. An index outside [0, E) is an expert on another device; it adds
    nothing.
    """
    tokens, top_k = top_k_index.shape
    permutation: Permutation = sort_by_expert(top_k_index, experts.gate_up.experts)
    slots = torch.empty(tokens * top_k, experts.down.shape[0], dtype=x.dtype, device=x.device)
    sorted_expert_mlp(
        x,
        permutation.offsets,
        experts,
        rows=tokens * top_k,
        gather=permutation.order,
        gather_by=top_k,
        slots=permutation.order,
        out=slots,
    )
    return combine(slots.view(tokens, top_k, -1), top_k_weights, present=top_k_index, experts=experts.gate_up.experts)
