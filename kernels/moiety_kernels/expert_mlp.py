"""Several experts' MLPs over rows sorted by expert: the torch kernel of CPU replicas.

Shape legend: R rows, D hidden size, I intermediate size, O = 2I when gated, else I.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moiety_kernels.reference import activate
from moiety_kernels.weights import ExpertWeights

__all__ = ["ExpertWeights", "grouped_expert_mlp"]


@torch.no_grad()
def grouped_expert_mlp(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
) -> torch.Tensor:
    """Row i through the expert it is sorted under: [R, D] -> [R, D], in the rows' dtype, which must be the weights'.

    The first `counts[0]` rows belong to `weights[0]`, the next `counts[1]` to `weights[1]`, and so on. A count may be
    0: those weights are not touched. Raises ValueError where the counts do not add up to R.
    """
    if len(counts) != len(weights):
        raise ValueError(f"{len(counts)} counts for {len(weights)} experts")
    if sum(counts) != rows.shape[0] or min(counts, default=0) < 0:
        raise ValueError(f"counts add up to {sum(counts)}: must be {rows.shape[0]} rows, none negative")
    if not rows.shape[0]:
        return torch.empty_like(rows)

    width = weights[0].gate_up.shape[1 if transposed else 0]
    projected = rows.new_empty(rows.shape[0], width)  # [R, O]
    for span, expert in _activated(counts, weights):
        matrix = expert.gate_up if transposed else expert.gate_up.T
        torch.mm(rows[span], matrix, out=projected[span])
        if expert.gate_up_bias is not None:
            projected[span] += expert.gate_up_bias

    # One call over all rows, not one per expert: at a few rows each, dispatch would cost more than the arithmetic.
    inner = activate(
        projected, activation=activation, gated=gated, interleaved=interleaved, limit=limit, alpha=alpha
    )  # [R, I]

    out = torch.empty_like(rows)
    for span, expert in _activated(counts, weights):
        torch.mm(inner[span], expert.down if transposed else expert.down.T, out=out[span])
        if expert.down_bias is not None:
            out[span] += expert.down_bias
    return out


def _activated(counts: Sequence[int], weights: Sequence[ExpertWeights]) -> Iterator[tuple[slice, ExpertWeights]]:
    """The row span and weights of each expert that has rows."""
    start = 0
    for count, expert in zip(counts, weights, strict=True):
        if count:
            yield slice(start, start + count), expert
        start += count
