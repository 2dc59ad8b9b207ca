"""Random experts and rows for the Triton tests, their error bounds, and their float64 results."""

from __future__ import annotations

import expert_cases
import torch

from moiety_kernels import Activation, ExpertWeights, expert_mlp

HIDDEN, INTERMEDIATE = 64, 32

# Largest error over the largest output, against float64 on the same weights: two products of 64 and 32 terms, with one
# rounding of the row between them to the rows' dtype.
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_weights(
    kind: Activation, dtype: torch.dtype, seed: int, hidden: int = HIDDEN, inner: int = INTERMEDIATE, **options: bool
) -> ExpertWeights:
    """Returns one random expert like `expert_cases.make_weights`, by default of this file's sizes."""
    return expert_cases.make_weights(kind, dtype, seed, hidden, inner, **options)


def make_rows(count: int, dtype: torch.dtype, hidden: int = HIDDEN, seed: int = 1) -> torch.Tensor:
    """Returns normally distributed rows."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_float64(rows: torch.Tensor, counts: tuple[int, ...], weights: list[ExpertWeights], kind: Activation):
    """Computes the reference expert by expert, on the same values in float64."""
    outs = []
    for part, expert in zip(rows.double().split(list(counts)), weights, strict=True):
        plain = expert.dequantised(torch.float64)
        wide = (
            None if t is None else t.double() for t in (plain.gate_up, plain.down, plain.gate_up_bias, plain.down_bias)
        )
        outs.append(expert_mlp(part, ExpertWeights(*wide), kind))  # type: ignore[arg-type]
    return torch.cat(outs)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest error over the largest output."""
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()
