"""MLPs of expert slices over rows sorted by slice: float32 outputs, which the caller sums before rounding.

Shape legend: R rows, D hidden size, I intermediate size of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from moiety_kernels.ops.by_format import Backend, for_each_format, run_in_triton, uses_triton
from moiety_kernels.ops.expert_mlp import grouped_expert_mlp
from moiety_kernels.ops.linear import linear
from moiety_kernels.reference.expert_mlp import activate
from moiety_kernels.weights.expert_weights import ExpertWeights, dequantised


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
    """Runs each of `rows` [R, D] through its expert slice, like `grouped_expert_mlp`; returns float32 outputs [R, D].

    The caller adds the outputs of an expert's slices and rounds only their sum. For float32 rows this calls
    `grouped_expert_mlp`. For other rows, Triton kernels store their float32 sums. Without Triton, the inputs of the second
    product are converted to float32, which is slower.
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
        compute = partial(run_in_triton, dtype=torch.float32, deterministic=deterministic, options=options)
        return for_each_format(compute, rows, counts, weights, torch.float32)
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    start = 0
    for count, expert in zip(counts, weights, strict=True):
        if count:
            span = slice(start, start + count)
            gate_up, down = dequantised(expert.gate_up, rows.dtype), dequantised(expert.down, rows.dtype)
            projected = linear(rows[span], gate_up, deterministic=deterministic)
            if expert.gate_up_bias is not None:
                projected = projected + expert.gate_up_bias
            # [count, I]
            inner = activate(
                projected, activation=activation, gated=gated, interleaved=interleaved, limit=limit, alpha=alpha
            )
            product = linear(inner.float(), down.float(), deterministic=deterministic)
            out[span] = product if expert.down_bias is None else product + expert.down_bias.float()
            start += count
    return out
