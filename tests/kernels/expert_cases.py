"""Random experts of every kind, their error bounds, and their float64 results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moiety_kernels import SWIGLU, Activation, ExpertWeights, expert_mlp

HIDDEN, INTERMEDIATE = 64, 40

COUNTS = {
    "one row": (1,),  # decode of one sequence: a matrix-vector product
    "an empty expert between others": (3, 0, 2),  # no token chose it
    "empty experts at both ends": (0, 5, 0),
    "one hot expert with every row": (0, 0, 33, 0),  # skewed routing
    "uneven tails": (1, 7, 16, 17, 31),  # below, at and past every vector width
    "a prefill's worth of rows": (0, 130, 3),  # where torch's packed product is faster for bfloat16
    "no row at all": (0, 0),
}
KINDS = {
    "swiglu": SWIGLU,
    "gelu gate": Activation("gelu"),
    "tanh gelu gate": Activation("gelu_pytorch_tanh"),
    "relu": Activation("relu", gated=False),
    "gelu": Activation("gelu", gated=False),
    "squared relu": Activation("relu2", gated=False),
    "clamped silu": Activation(limit=1.0),
    "gpt-oss": Activation("swiglu_clamped", interleaved=True, limit=1.0, alpha=1.702),
}
# Largest error over the largest output: two matrix products of 64 and 40 terms, each within a few units in the last place.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 3e-2}
# Factors on the bound: torch's libraries may add 6200 products one after the other, an error of 2.3e-6 on an AMD EPYC.
LOOSER = {"C++": 1, "torch": 4}


def make_weights(
    kind: Activation,
    dtype: torch.dtype,
    seed: int,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    *,
    biased: bool | None = None,
) -> ExpertWeights:
    """Returns one random expert for `kind`, by default with biases where gate and up are interleaved, as in gpt-oss."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.15).to(dtype)

    width = intermediate * (2 if kind.gated else 1)
    matrices = normal(width, hidden), normal(hidden, intermediate)
    biased = kind.interleaved if biased is None else biased
    return ExpertWeights(*matrices, normal(width), normal(hidden)) if biased else ExpertWeights(*matrices)


def in_float64(weights: ExpertWeights) -> ExpertWeights:
    """Returns the same values in float64."""
    parts = (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    return ExpertWeights(*(None if part is None else part.double() for part in parts))  # type: ignore[arg-type,union-attr]


def one_at_a_time(rows: torch.Tensor, counts: Sequence[int], weights: Sequence[ExpertWeights], kind: Activation):
    """Computes the reference, expert by expert."""
    parts = zip(rows.split(list(counts)), weights, strict=True)
    return torch.cat([expert_mlp(part, expert, kind) for part, expert in parts])
