"""Cuts an expert along its intermediate dimension into slices, for devices that cannot hold it whole.

The slices' outputs add up to the expert's. Slice s of S has rows [s * I / S, (s + 1) * I / S) of gate and up and the same
columns of down; only slice 0 has the bias of down. S determines the boundaries, so routers and replicas must agree on S.

Legend: I intermediate size, D hidden size, S slices.
"""

from __future__ import annotations

import torch

from moiety.core.experts import ExpertMLP
from moiety_kernels import ExpertWeights
from moiety_kernels.weights.expert_weights import dequantised


def slice_of(expert: ExpertWeights, mlp: ExpertMLP, number: int, slices: int, dtype: torch.dtype) -> ExpertWeights:
    """Returns slice `number` of an expert that `mlp` describes, as weights that share no memory with the expert.

    The slice of a quantised expert holds dequantised values in `dtype`.
    """
    gate_up, down = dequantised(expert.gate_up, dtype), dequantised(expert.down, dtype)
    size = mlp.intermediate // slices
    span = slice(number * size, (number + 1) * size)

    def gate_up_slice(tensor: torch.Tensor) -> torch.Tensor:
        """Returns the slice's rows of `tensor`, which is gate and up [2I, …], or up alone [I, …] for an ungated expert."""
        if not mlp.gated:
            return tensor[span].clone()
        if mlp.interleaved:  # a pair of rows is one intermediate feature
            return tensor[2 * span.start : 2 * span.stop].clone()
        return torch.cat([half[span] for half in tensor.chunk(2)])

    bias = expert.down_bias
    return ExpertWeights(
        gate_up_slice(gate_up),
        down[:, span].clone(memory_format=torch.contiguous_format),
        None if expert.gate_up_bias is None else gate_up_slice(expert.gate_up_bias),
        None if bias is None else bias.clone() if number == 0 else torch.zeros_like(bias),
    )
