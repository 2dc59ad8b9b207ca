"""An expert too large for a device, cut along its intermediate dimension: slices whose outputs add up to the expert's.

Slice s of S takes rows [s * I / S, (s + 1) * I / S) of gate and up and the same columns of down; the bias of down is slice
0's alone. The boundaries follow from S, so S is part of what routers and replicas must agree on.

Legend: I intermediate size, D hidden size, S slices.
"""

from __future__ import annotations

import torch

from moiety.core.experts import ExpertMLP
from moiety_kernels import ExpertWeights
from moiety_kernels.weights.expert_weights import dequantised


def sliced_revision(revision: str, slices: int) -> str:
    """What routers and expert replicas call a model served in `slices`: those of another number never meet."""
    return revision if slices == 1 else f"{revision}-slices{slices}"


def slice_of(expert: ExpertWeights, mlp: ExpertMLP, number: int, slices: int, dtype: torch.dtype) -> ExpertWeights:
    """Slice `number` of an expert of the form `mlp`, as weights of their own that share no memory with it.

    Of one that is held quantised it is the slice of its values, in `dtype`.
    """
    gate_up, down = dequantised(expert.gate_up, dtype), dequantised(expert.down, dtype)
    size = mlp.intermediate // slices
    span = slice(number * size, (number + 1) * size)

    def of_inputs(tensor: torch.Tensor) -> torch.Tensor:
        """Of gate and up, [2I, …], or of up alone, [I, …]."""
        if not mlp.gated:
            return tensor[span].clone()
        if mlp.interleaved:  # a pair of rows is one intermediate feature
            return tensor[2 * span.start : 2 * span.stop].clone()
        return torch.cat([half[span] for half in tensor.chunk(2)])

    bias = expert.down_bias
    return ExpertWeights(
        of_inputs(gate_up),
        down[:, span].clone(memory_format=torch.contiguous_format),
        None if expert.gate_up_bias is None else of_inputs(expert.gate_up_bias),
        None if bias is None else bias.clone() if number == 0 else torch.zeros_like(bias),
    )
