"""A batch of experts that are held in different ways, taken one way at a time; and the way of all of them on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, Literal

import torch

from moiety_kernels.weights.expert_weights import ExpertWeights

Backend = Literal["torch", "triton"]  # torch: and C++, on CPU
Compute = Callable[[torch.Tensor, Sequence[int], Sequence[ExpertWeights]], torch.Tensor]


def by_kind(
    compute: Compute, rows: torch.Tensor, counts: Sequence[int], weights: Sequence[ExpertWeights], dtype: torch.dtype
) -> torch.Tensor:
    """`compute` over the rows [R, D] of each way of holding experts (equal `held`): its results [R, D] in the rows' order."""
    if len({expert.held for expert in weights}) == 1:
        return compute(rows, counts, weights)
    kinds: dict[Any, list[int]] = {}
    for place, (count, expert) in enumerate(zip(counts, weights, strict=True)):
        if count:
            kinds.setdefault(expert.held, []).append(place)
    starts = [0, *accumulate(counts)]
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    for places in kinds.values():
        taken = torch.cat([torch.arange(starts[place], starts[place + 1]) for place in places]).to(rows.device)
        out[taken] = compute(rows[taken], [counts[place] for place in places], [weights[place] for place in places])
    return out


def uses_triton(rows: torch.Tensor) -> bool:
    """Rows are on a GPU, and Triton is installed."""
    return rows.is_cuda and find_spec("triton") is not None


def in_triton(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    dtype: torch.dtype,
    deterministic: bool,
    options: dict[str, Any],
) -> torch.Tensor:
    """Experts with equal `held` by the Triton kernels: [R, D] in `dtype`. The host waits for nothing."""
    from moiety_kernels.gpu.expert_mlp import Experts, sorted_expert_mlp  # here: Triton is slow to import
    from moiety_kernels.gpu.operand import gathered

    with torch.cuda.device(rows.get_device()):  # Triton launches on the current one; -1, of a CPU, changes none
        offsets, gate_up, down = gathered(counts, weights)
        out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        return sorted_expert_mlp(rows, offsets, Experts(gate_up, down, **options), out=out, deterministic=deterministic)
