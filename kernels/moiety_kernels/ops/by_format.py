"""Helpers of expert_mlp: they split a batch by weight format and run the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Literal

import torch

from moiety_kernels.reference.activation import Activation
from moiety_kernels.weights.expert_weights import ExpertWeights

Backend = Literal["torch", "triton"]  # "torch" includes the C++ kernels on CPU
Compute = Callable[[torch.Tensor, Sequence[int], Sequence[ExpertWeights]], torch.Tensor]


def for_each_format(
    compute: Compute, rows: torch.Tensor, counts: Sequence[int], weights: Sequence[ExpertWeights], dtype: torch.dtype
) -> torch.Tensor:
    """Calls `compute` once per weight format among `weights`; returns all results [R, D] in the order of `rows` [R, D].

    Experts have the same format if their `weight_format` is equal.
    """
    if len({expert.weight_format for expert in weights}) == 1:
        return compute(rows, counts, weights)
    kinds: dict[Any, list[int]] = {}
    for place, (count, expert) in enumerate(zip(counts, weights, strict=True)):
        if count:
            kinds.setdefault(expert.weight_format, []).append(place)
    starts = [0, *accumulate(counts)]
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    for places in kinds.values():
        taken = torch.cat([torch.arange(starts[place], starts[place + 1]) for place in places]).to(rows.device)
        out[taken] = compute(rows[taken], [counts[place] for place in places], [weights[place] for place in places])
    return out


def uses_triton(rows: torch.Tensor) -> bool:
    """Whether the rows are on a GPU and Triton is installed."""
    return rows.is_cuda and find_spec("triton") is not None


def run_in_triton(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    activation: Activation,
    dtype: torch.dtype,
    deterministic: bool,
) -> torch.Tensor:
    """Computes experts of one weight format with the Triton kernels: [R, D] in `dtype`. The host does not wait for the GPU."""
    # Imported late: Triton is slow to import.
    from moiety_kernels.gpu.expert_mlp import ExpertOperands, sorted_expert_mlp
    from moiety_kernels.gpu.operand import operands_of

    with torch.cuda.device(rows.get_device()):  # Triton launches on the current device; a CPU's -1 changes nothing
        offsets, gate_up, down = operands_of(counts, weights)
        out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        experts = ExpertOperands(gate_up, down, activation)
        return sorted_expert_mlp(rows, offsets, experts, out=out, deterministic=deterministic)
