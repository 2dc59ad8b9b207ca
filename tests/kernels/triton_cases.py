"""Random experts and rows for the Triton tests, their error bounds, and their float64 results."""

from __future__ import annotations

from typing import Any

import torch
from expert_cases import options_of

from moiety_kernels import ExpertWeights, expert_mlp

HIDDEN, INTERMEDIATE = 64, 32

KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {"activation": "silu"},
    "gelu gate": {"activation": "gelu"},
    "tanh gelu gate": {"activation": "gelu_pytorch_tanh"},
    "relu": {"activation": "relu", "gated": False},
    "gelu": {"activation": "gelu", "gated": False},
    "squared relu": {"activation": "relu2", "gated": False},
    "clamped silu": {"activation": "silu", "limit": 1.0},
    "gpt-oss": {"activation": "swiglu_clamped", "interleaved": True, "biased": True, "limit": 1.0, "alpha": 1.702},
}
# Largest error over the largest output, against float64 on the same weights: two products of 64 and 32 terms, with one
# rounding of the row between them to the rows' dtype.
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_weights(kind: dict[str, Any], dtype: torch.dtype, seed: int, hidden: int = HIDDEN, inner: int = INTERMEDIATE):
    """Returns one random expert of `kind`, with biases where the kind has them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.15).to(dtype)

    width = inner * (2 if kind.get("gated", True) else 1)
    matrices = normal(width, hidden), normal(hidden, inner)
    return ExpertWeights(*matrices, normal(width), normal(hidden)) if kind.get("biased") else ExpertWeights(*matrices)


def make_rows(count: int, dtype: torch.dtype, hidden: int = HIDDEN, seed: int = 1) -> torch.Tensor:
    """Returns normally distributed rows."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_float64(rows: torch.Tensor, counts: tuple[int, ...], weights: list[ExpertWeights], kind: dict[str, Any]):
    """Computes the reference expert by expert, on the same values in float64."""
    outs = []
    for part, expert in zip(rows.double().split(list(counts)), weights, strict=True):
        plain = expert.dequantised(torch.float64)
        wide = (
            None if t is None else t.double() for t in (plain.gate_up, plain.down, plain.gate_up_bias, plain.down_bias)
        )
        outs.append(expert_mlp(part, ExpertWeights(*wide), **options_of(kind)))  # type: ignore[arg-type]
    return torch.cat(outs)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest error over the largest output."""
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()
