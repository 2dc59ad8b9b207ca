"""The torch expert kernel: against float64, against the reference, against transformers' own experts modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moiety_kernels import ExpertWeights, activate, expert_mlp, grouped_expert_mlp

HIDDEN, INTERMEDIATE = 64, 40

COUNTS = {
    "one row": (1,),  # decode of one sequence: a matrix-vector product
    "an empty expert between others": (3, 0, 2),  # held, but no token chose it
    "empty experts at both ends": (0, 5, 0),
    "one hot expert with every row": (0, 0, 33, 0),  # skewed routing
    "uneven tails": (1, 7, 16, 17, 31),  # below, at and past every vector width
    "no row at all": (0, 0),
}
KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {"activation": "silu"},
    "gelu gate": {"activation": "gelu"},
    "tanh gelu gate": {"activation": "gelu_pytorch_tanh"},
    "relu": {"activation": "relu", "gated": False},
    "squared relu": {"activation": "relu2", "gated": False},
    "clamped silu": {"activation": "silu", "limit": 1.0},
    "gpt-oss": {"activation": "swiglu_clamped", "interleaved": True, "transposed": True, "limit": 1.0, "alpha": 1.702},
}
# Largest error over the largest output. Two matrix products of 64 and 40 terms: a few units in the last place of each.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def make_weights(kind: dict[str, Any], dtype: torch.dtype, seed: int) -> ExpertWeights:
    """One random expert of `kind`, biased where its model's experts are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.15).to(dtype)

    width = INTERMEDIATE * (2 if kind.get("gated", True) else 1)
    if kind.get("transposed"):
        return ExpertWeights(normal(HIDDEN, width), normal(INTERMEDIATE, HIDDEN), normal(width), normal(HIDDEN))
    return ExpertWeights(normal(width, HIDDEN), normal(HIDDEN, INTERMEDIATE))


def in_float64(weights: ExpertWeights) -> ExpertWeights:
    """The same values at twice the precision."""
    bias, down_bias = weights.gate_up_bias, weights.down_bias
    return ExpertWeights(
        weights.gate_up.double(),
        weights.down.double(),
        None if bias is None else bias.double(),
        None if down_bias is None else down_bias.double(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_is_within_rounding_of_float64(counts: tuple[int, ...], kind: dict[str, Any], dtype: torch.dtype):
    """Every kind of expert, at every shape of batch, stays within the stated bound of the float64 result."""
    rows = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = [make_weights(kind, dtype, seed) for seed in range(len(counts))]
    out = grouped_expert_mlp(rows, counts, weights, **kind)
    exact = [
        expert_mlp(part, in_float64(expert), **kind)
        for part, expert in zip(rows.double().split(counts), weights, strict=True)
    ]
    expected = torch.cat(exact)
    assert out.dtype == dtype
    assert out.shape == rows.shape
    if counts and sum(counts):
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error.item() <= BOUND[dtype]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_grouped_equals_one_expert_at_a_time(kind: dict[str, Any]):
    """A row's result depends on its own expert only, not on which other experts run in the same call."""
    counts = (2, 0, 5)
    rows = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(2))
    weights = [make_weights(kind, torch.float32, seed) for seed in range(3)]
    out = grouped_expert_mlp(rows, counts, weights, **kind)
    alone = [expert_mlp(part, expert, **kind) for part, expert in zip(rows.split(counts), weights, strict=True)]
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=1e-6)


@dataclass
class Config:
    """What the experts classes below read of a transformers config."""

    num_local_experts: int = 5
    hidden_size: int = HIDDEN
    intermediate_size: int = INTERMEDIATE
    hidden_act: str = "silu"
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    _experts_implementation: str = "grouped_mm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "gpt-oss"])
def test_equals_the_transformers_module(kind: str, dtype: torch.dtype):
    """Same rows, same experts: bit-equal to transformers' grouped_mm in both dtypes."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = Config()
    options = {**KINDS["gpt-oss"], "limit": config.swiglu_limit} if kind == "gpt-oss" else {}
    module = (GptOssExperts if kind == "gpt-oss" else MixtralExperts)(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.15).to(dtype)
    weights = [
        ExpertWeights(
            module.gate_up_proj[e],
            module.down_proj[e],
            module.gate_up_proj_bias[e] if module.has_bias else None,
            module.down_proj_bias[e] if module.has_bias else None,
        )
        for e in range(config.num_local_experts)
    ]
    counts = (1, 0, 16, 3, 9)
    rows = (torch.randn(sum(counts), HIDDEN, generator=generator) * 8).to(dtype)  # many gates pass the limit
    index = torch.repeat_interleave(torch.arange(5), torch.tensor(counts)).unsqueeze(1)
    with torch.no_grad():
        expected = module(rows, index, torch.ones(len(rows), 1, dtype=dtype))
    assert torch.equal(grouped_expert_mlp(rows, counts, weights, **options), expected)


def test_counts_must_cover_the_rows():
    """Counts that do not add up to the rows, or to the experts, are refused instead of read past."""
    weights = [make_weights({}, torch.float32, 0)]
    with pytest.raises(ValueError, match="must be 3 rows"):
        grouped_expert_mlp(torch.zeros(3, HIDDEN), (2,), weights)
    with pytest.raises(ValueError, match="2 counts for 1 experts"):
        grouped_expert_mlp(torch.zeros(3, HIDDEN), (2, 1), weights)


def test_unknown_activations_are_refused():
    """An activation no kernel knows, or one that lacks its constants, is an error that lists what exists."""
    with pytest.raises(ValueError, match="must be one of silu"):
        activate(torch.zeros(1, 4), activation="mish")
    with pytest.raises(ValueError, match="alpha"):
        activate(torch.zeros(1, 4), activation="swiglu_clamped")
