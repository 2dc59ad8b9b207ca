"""The expert kernels, C++ and torch: against float64, the reference and transformers' own experts modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from expert_cases import (
    BOUND,
    COUNTS,
    HIDDEN,
    INTERMEDIATE,
    KINDS,
    LOOSER,
    in_float64,
    make_weights,
    one_at_a_time,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiety_kernels import SWIGLU, Activation, ExpertWeights, grouped_expert_mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_grouped_is_within_rounding_of_float64(
    kernels: str, counts: tuple[int, ...], kind: Activation, dtype: torch.dtype
):
    """Every kind of expert, in every batch shape, stays within its bound of the float64 result."""
    rows = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = [make_weights(kind, dtype, seed) for seed in range(len(counts))]
    out = grouped_expert_mlp(rows, counts, weights, kind)
    expected = one_at_a_time(rows.double(), counts, [in_float64(expert) for expert in weights], kind)
    assert out.dtype == dtype
    assert out.shape == rows.shape
    if sum(counts):
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error.item() <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [KINDS["swiglu"], KINDS["gpt-oss"], KINDS["relu"]], ids=["swiglu", "gpt-oss", "relu"])
@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [
        (70, 33),  # no multiple of any vector width: masked ends everywhere
        (8, 3),  # less than one vector
        (6200, 96),  # deeper than one part of a product, even for one row
    ],
)
def test_odd_sizes(kernels: str, hidden: int, intermediate: int, kind: Activation, dtype: torch.dtype):
    """Widths that are no multiple of a vector, and products deep enough to be split into parts, meet their bound."""
    counts = (1, 0, 7, 2)
    rows = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = [make_weights(kind, dtype, seed, hidden, intermediate) for seed in range(len(counts))]
    out = grouped_expert_mlp(rows, counts, weights, kind)
    expected = one_at_a_time(rows.double(), counts, [in_float64(expert) for expert in weights], kind)
    assert (out.double() - expected).abs().max() <= BOUND[dtype] * LOOSER[kernels] * expected.abs().max()


def test_threads_change_no_bit(kernels: str):
    """The number of threads changes no bit of any row."""
    counts = (40, 1, 0, 3)
    rows = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(2)).bfloat16()
    weights = [make_weights(SWIGLU, torch.bfloat16, seed) for seed in range(len(counts))]
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(grouped_expert_mlp(rows, counts, weights, deterministic=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)


@pytest.mark.parametrize("outputs", [None, torch.float32], ids=["rounded", "sums"])
@pytest.mark.parametrize("weights_as", ["float32", "bfloat16", "int8"])
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any), kind=st.sampled_from(sorted(KINDS)))
def test_deterministic_bits_do_not_depend_on_the_batch(
    kernels: str, weights_as: str, outputs: torch.dtype | None, counts: list[int], kind: str
):
    """With `deterministic` a row has the same bits alone and among other rows, in every dtype."""
    dtype = torch.float32 if weights_as == "float32" else torch.bfloat16
    rows = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(sum(counts))).to(dtype)
    weights = [make_weights(KINDS[kind], dtype, seed) for seed in range(len(counts))]
    if weights_as == "int8":
        weights = [expert.quantised(rounds_rows=True) for expert in weights]
    compute = partial(grouped_expert_mlp, activation=KINDS[kind], deterministic=True, dtype=outputs)
    together = compute(rows, counts, weights)
    expert_of = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row in {0, len(rows) // 2, len(rows) - 1}:
        alone = compute(rows[row : row + 1], (1,), [weights[expert_of[row]]])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_int8_is_within_its_bound(kernels: str, kind: Activation, dtype: torch.dtype):
    """int8 experts that also round rows stay within 4 % of unquantised ones, in half of bfloat16's memory."""
    hidden, intermediate, counts = 512, 192, (1, 0, 5, 13)
    rows = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(4)).to(dtype)
    weights = [make_weights(kind, dtype, seed, hidden, intermediate) for seed in range(len(counts))]
    quantised = [expert.quantised(rounds_rows=True) for expert in weights]
    out = grouped_expert_mlp(rows, counts, quantised, kind)
    expected = one_at_a_time(rows.double(), counts, [in_float64(expert) for expert in weights], kind)
    assert (out.double() - expected).norm() <= 0.04 * expected.norm()
    assert quantised[0].nbytes < 0.55 * weights[0].nbytes * (2 / dtype.itemsize)


def test_int8_rows_with_infinities_are_not_numbers(kernels: str):
    """A row with an infinity gives NaN in that row only; a row of zeros stays zeros."""
    rows = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(5))
    rows[0, 3], rows[1] = torch.inf, 0.0
    out = grouped_expert_mlp(rows, (3,), [make_weights(SWIGLU, torch.float32, 0).quantised(rounds_rows=True)])
    assert out[0].isnan().all()
    assert out[1].eq(0).all()
    assert out[2].isfinite().all()


@dataclass
class Config:
    """The fields of a transformers config that the experts classes below read."""

    num_local_experts: int = 5
    hidden_size: int = HIDDEN
    intermediate_size: int = INTERMEDIATE
    hidden_act: str = "silu"
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    _experts_implementation: str = "grouped_mm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "gpt-oss"])
def test_equals_the_transformers_module(kernels: str, kind: str, dtype: torch.dtype):
    """Outputs equal transformers' grouped_mm: bit for bit in torch, up to the order of sums in C++."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = Config()
    activation = replace(KINDS["gpt-oss"], limit=config.swiglu_limit) if kind == "gpt-oss" else SWIGLU
    module = (GptOssExperts if kind == "gpt-oss" else MixtralExperts)(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.15).to(dtype)
    weights = [
        ExpertWeights(
            (module.gate_up_proj[e].T if module.is_transposed else module.gate_up_proj[e]).contiguous(),
            (module.down_proj[e].T if module.is_transposed else module.down_proj[e]).contiguous(),
            module.gate_up_proj_bias[e] if module.has_bias else None,
            module.down_proj_bias[e] if module.has_bias else None,
        )
        for e in range(config.num_local_experts)
    ]
    counts = (1, 0, 16, 3, 9)
    rows = (torch.randn(sum(counts), HIDDEN, generator=generator) * 8).to(dtype)  # many gates exceed the limit
    index = torch.repeat_interleave(torch.arange(5), torch.tensor(counts)).unsqueeze(1)
    with torch.no_grad():
        expected = module(rows, index, torch.ones(len(rows), 1, dtype=dtype))
    out = grouped_expert_mlp(rows, counts, weights, activation)
    if kernels == "torch" and kind == "swiglu":
        assert torch.equal(out, expected)
    assert (out - expected).abs().max() <= BOUND[dtype] * expected.abs().max()


def test_counts_must_cover_the_rows():
    """Counts that do not match the rows or the experts raise ValueError instead of reading past the end."""
    weights = [make_weights(SWIGLU, torch.float32, 0)]
    with pytest.raises(ValueError, match="must be 3 rows"):
        grouped_expert_mlp(torch.zeros(3, HIDDEN), (2,), weights)
    with pytest.raises(ValueError, match="2 counts for 1 experts"):
        grouped_expert_mlp(torch.zeros(3, HIDDEN), (2, 1), weights)


def test_outputs_are_in_the_dtype_of_the_rows_or_float32():
    """Another dtype for the outputs raises ValueError."""
    with pytest.raises(ValueError, match="must be float32 or that of the rows"):
        grouped_expert_mlp(torch.zeros(1, HIDDEN), (1,), [make_weights(SWIGLU, torch.float32, 0)], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mish"}, "must be one of silu"),
        ({"name": "swiglu_clamped", "limit": 7.0}, "alpha None: must be a number"),
        ({"alpha": 1.7}, "alpha 1.7: must be None for the activation 'silu'"),
        ({"name": "swiglu_clamped", "alpha": 1.7, "gated": False}, "gated False"),
        ({"gated": False, "limit": 7.0}, "gated False"),
        ({"gated": False, "interleaved": True}, "gated False"),  # C++ would read past the end of the weights
    ],
)
def test_activations_that_no_kernel_computes_are_refused(options: dict[str, Any], message: str):
    """An unknown name, a constant too many or too few, or a gate's option without a gate raises ValueError."""
    with pytest.raises(ValueError, match=message):
        Activation(**options)
