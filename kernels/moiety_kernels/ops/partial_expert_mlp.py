"""Several slices of experts over rows sorted by slice: outputs in float32, to be summed before they are rounded.

Shape legend: R rows, D hidden size, I intermediate size of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from moiety_kernels.ops.by_format import Backend, by_kind, in_triton, uses_triton
from moiety_kernels.ops.expert_mlp import ExpertWeights, grouped_expert_mlp
from moiety_kernels.ops.linear import linear
from moiety_kernels.reference.expert_mlp import activate
from moiety_kernels.weights.expert_weights import dequantised


@torch.no_grad()
def grouped_partial_mlp(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
    deterministic: bool = False,
    backend: Backend | None = None,
) -> torch.Tensor:
    """As `grouped_expert_mlp`, [R, D] -> [R, D], but float32 whatever the rows' dtype: only the sum is to be rounded.

    In float32 it is the same computation. On a GPU Triton stores its sums as they are.
    Otherwise the second product is taken of widened values: twice the time.
    """
    if rows.dtype == torch.float32:
        return grouped_expert_mlp(
            rows,
            counts,
            weights,
            activation=activation,
            gated=gated,
            interleaved=interleaved,
            limit=limit,
            alpha=alpha,
            deterministic=deterministic,
            backend=backend,
        )
    if rows.shape[0] and (backend == "triton" or (backend is None and uses_triton(rows))):
        options: dict[str, Any] = {
            "activation": activation,
            "gated": gated,
            "interleaved": interleaved,
            "limit": limit,
            "alpha": alpha,
        }
        compute = partial(in_triton, dtype=torch.float32, deterministic=deterministic, options=options)
        return by_kind(compute, rows, counts, weights, torch.float32)
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    start = 0
    for count, held in zip(counts, weights, strict=True):
        if count:
            span = slice(start, start + count)
            gate_up, down = dequantised(held.gate_up, rows.dtype), dequantised(held.down, rows.dtype)
            projected = linear(rows[span], gate_up, deterministic=deterministic)
            if held.gate_up_bias is not None:
                projected = projected + held.gate_up_bias
            inner = activate(
                projected, activation=activation, gated=gated, interleaved=interleaved, limit=limit, alpha=alpha
            )  # [count, I]
            product = linear(inner.float(), down.float(), deterministic=deterministic)
            out[span] = product if held.down_bias is None else product + held.down_bias.float()
            start += count
    return out
