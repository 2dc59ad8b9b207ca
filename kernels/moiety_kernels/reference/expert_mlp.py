"""One expert's MLP in plain torch: the definition against which every faster kernel is tested.

Operations, their order and their dtypes follow transformers' `integrations/moe.py`: a bias is added to the rounded product,
and activations run in the rows' dtype. So results equal transformers' bit for bit if the matrix products do.

Shape legend: R rows, D hidden size, I intermediate size, O = 2I when gated, else I.
"""

from __future__ import annotations

import torch

from moiety_kernels.reference.activation import SWIGLU, Activation, activate
from moiety_kernels.weights.expert_weights import ExpertWeights, dequantised


def expert_mlp(rows: torch.Tensor, weights: ExpertWeights, activation: Activation = SWIGLU) -> torch.Tensor:
    """Runs `rows` [R, D] through one expert; returns [R, D] in the rows' dtype. Plain weights must have this dtype."""
    projected = rows @ dequantised(weights.gate_up, rows.dtype).T  # [R, O]
    if weights.gate_up_bias is not None:
        projected = projected + weights.gate_up_bias
    out = activate(projected, activation) @ dequantised(weights.down, rows.dtype).T  # [R, D]
    return out if weights.down_bias is None else out + weights.down_bias
