"""Permutation, combination, gating and fp8 rows in Triton's interpreter: invariants, and against plain torch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety_kernels.reference.gating import Gate, gating_reference

pytest.importorskip("triton", reason="triton is not installed: pip install 'moiety[gpu]'")

from moiety_kernels.gpu.combine import combine
from moiety_kernels.gpu.gating import gating
from moiety_kernels.gpu.permute import permute, sort_by_expert, unpermute
from moiety_kernels.gpu.row_fp8 import dequantise_rows, quantise_rows

SHAPES = {
    "one token": (1, 1, 4),  # decode, top-1
    "one block": (16, 8, 128),  # the most assignments that one launch sorts
    "two blocks": (43, 3, 5),  # one assignment more: three launches, and a nearly empty block
    "many experts": (20, 8, 257),  # more than 256, no power of two
    "no token": (0, 2, 4),
}


def indices(tokens: int, top_k: int, experts: int, seed: int = 0, low: int = 0) -> torch.Tensor:
    """Returns random expert indices [T, K], from `low` to `experts` - 1 - `low`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, experts - low, (tokens, top_k), generator=generator)


def check_permutation(index: torch.Tensor, experts: int) -> None:
    """Asserts that rows are stably sorted by expert, rows of other devices last, and that positions are the inverse."""
    where = sort_by_expert(index, experts)
    flat = index.flatten()
    key = torch.where((flat < 0) | (flat >= experts), experts, flat)
    assert torch.equal(where.order.long(), key.argsort(stable=True))
    assert torch.equal(where.position[where.order.long()].long(), torch.arange(flat.numel()))
    counts = torch.bincount(key, minlength=experts + 1)[:experts]
    assert torch.equal(where.offsets.long(), torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_permutation_is_a_stable_sort(shape: tuple[int, int, int]):
    """The permutation of every shape equals torch's stable sort."""
    check_permutation(indices(*shape), shape[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_one_hot_expert(dtype: torch.dtype):
    """All rows go to the last of four experts, after three empty ones."""
    check_permutation(torch.full((140, 1), 3, dtype=dtype), 4)


@settings(deadline=None, max_examples=10)
@given(tokens=st.integers(1, 60), top_k=st.integers(1, 8), experts=st.integers(1, 12), seed=st.integers(0, 100))
def test_permutation_with_experts_that_are_not_here(tokens: int, top_k: int, experts: int, seed: int):
    """Indices outside [0, E) are sorted after all others."""
    check_permutation(indices(tokens, top_k, experts, seed, low=-2), experts)


def test_rows_come_back():
    """permute copies rows bit for bit, unpermute inverts it, and combine with weights that add up to 1 returns x."""
    x = torch.randn(21, 70, generator=torch.Generator().manual_seed(1)).bfloat16()
    index = indices(21, 3, 6)
    where = sort_by_expert(index, 6)
    rows = permute(x, where, 3)
    assert torch.equal(rows, x[where.order.long() // 3])
    back = unpermute(rows, where)
    assert torch.equal(back, x.repeat_interleave(3, 0))
    weights = torch.tensor([0.5, 0.25, 0.25]).repeat(21, 1)
    assert torch.equal(combine(back.view(21, 3, 70), weights), x)


def test_views_are_read_as_they_lie():
    """Slices of wider tensors and transposed tensors give the bits of contiguous copies."""
    wide = torch.randn(16, 12, generator=torch.Generator().manual_seed(4))
    for logits in (wide[:, 2:10], wide.T):
        index, weights = gating(logits, Gate(3))
        expected_index, expected = gating(logits.contiguous(), Gate(3))
        assert torch.equal(index, expected_index)
        assert torch.equal(weights, expected)
        assert torch.equal(quantise_rows(logits)[1], quantise_rows(logits.contiguous())[1])
        where = sort_by_expert(torch.zeros(len(logits), 1, dtype=torch.int64), 1)
        assert torch.equal(permute(logits, where, 1), logits)
    rows, routing = torch.randn(3, 2, 8), torch.rand(2, 3)
    assert torch.equal(combine(rows, routing.T), combine(rows, routing.T.contiguous()))


def test_combine_sums_in_order():
    """The sum over K runs in order, in float32, and is rounded once: the bits of a loop in torch."""
    rows = torch.randn(5, 8, 33, generator=torch.Generator().manual_seed(2)).bfloat16()
    weights = torch.rand(5, 8, generator=torch.Generator().manual_seed(3))
    total = torch.zeros(5, 33)
    for k in range(8):
        total += rows[:, k].float() * weights[:, k, None]
    assert torch.equal(combine(rows, weights), total.bfloat16())


GATES = {
    "Mixtral, Qwen3": Gate(2, renormalise=True),
    "unnormalised": Gate(4),
    "gpt-oss": Gate(4, "softmax_after"),
    "DeepSeek-V2": Gate(6, scaling=16.0, groups=4, kept_groups=2),
    "DeepSeek-V3": Gate(8, "sigmoid", True, 2.5, groups=8, kept_groups=4, group_score="top_two"),
    "one group left": Gate(1, "sigmoid", groups=2, kept_groups=1, group_score="top_two"),
    "every expert": Gate(16),  # K = E
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("experts", [16, 24])  # a power of two, and one with spare lanes
def test_gating(gate: Gate, experts: int):
    """Experts equal the reference's and weights do to float32 rounding, with and without a correction bias."""
    logits = torch.randn(9, experts, generator=torch.Generator().manual_seed(experts))
    for bias in (None, torch.randn(experts, generator=torch.Generator().manual_seed(1)) * 0.1):
        index, weights = gating(logits, gate, bias=bias)
        expected_index, _ = gating_reference(logits, gate, bias=bias)
        assert torch.equal(index.long(), expected_index)
        exact_index, exact = gating_reference(logits.double(), gate, bias=bias)
        assert torch.equal(exact_index, expected_index)
        assert (weights - exact).abs().max() <= 1e-6 * max(1.0, gate.scaling)


@settings(deadline=None, max_examples=12)
@given(name=st.sampled_from(sorted(GATES)), tokens=st.integers(1, 5), seed=st.integers(0, 1000))
def test_gating_with_ties(name: str, tokens: int, seed: int):
    """Equal scores go to the lower index, a token's experts differ, and renormalised weights add up to the scaling."""
    gate = GATES[name]
    logits = torch.randint(-2, 3, (tokens, 16), generator=torch.Generator().manual_seed(seed)).float()
    index, weights = gating(logits, gate)
    assert torch.equal(index.long(), gating_reference(logits, gate)[0])
    assert all(len(set(row)) == gate.top_k for row in index.tolist())
    if gate.renormalise:
        assert torch.allclose(weights.sum(1), torch.full((tokens,), gate.scaling))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_gating_of_no_numbers():
    """A NaN logit counts as the greatest and affects only its token; with infinities the indices stay distinct."""
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    logits[0, 11] = torch.nan
    logits[2, 4:] = -torch.inf
    index, weights = gating(logits, Gate(6, "softmax_after"))
    assert index[0, 0] == 11
    assert all(len(set(row)) == 6 and max(row) < 16 for row in index.tolist())
    assert weights[1:].isfinite().all()


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_gating_equals_transformers(model: str):
    """Experts and weights equal those of transformers' own router module."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = SimpleNamespace(
        num_experts_per_tok=4, num_local_experts=32, num_experts=32, hidden_size=24, norm_topk_prob=True,
        routed_scaling_factor=2.5, n_group=4, topk_group=2, router_jitter_noise=0.0,
    )  # fmt: skip
    classes: dict[str, tuple[Any, Gate]] = {
        "mixtral": (MixtralTopKRouter, Gate(4, renormalise=True)),
        "qwen3_moe": (Qwen3MoeTopKRouter, Gate(4, renormalise=True)),
        "gpt_oss": (GptOssTopKRouter, Gate(4, "softmax_after")),
        "deepseek_v3": (DeepseekV3TopkRouter, Gate(4, "sigmoid", True, 2.5, 4, 2, "top_two")),
    }
    make, gate = classes[model]
    router = make(config)
    generator = torch.Generator().manual_seed(7)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.2
    with torch.no_grad():
        logits, expected, chosen = router(torch.randn(11, 24, generator=generator))
    index, weights = gating(logits, gate, bias=getattr(router, "e_score_correction_bias", None))
    order, expected_order = index.long().sort(1), chosen.sort(1)  # DeepSeek's come unsorted
    assert torch.equal(order.values, expected_order.values)
    assert torch.allclose(weights.gather(1, order.indices), expected.gather(1, expected_order.indices), atol=1e-6)


def test_impossible_gates_are_refused():
    """A gate that no kernel can compute raises an error that names the broken bound."""
    logits = torch.zeros(1, 8)
    for change, message in (
        ({"top_k": 9}, "must be 1 to 8"),
        ({"groups": 3}, "must divide"),
        ({"scores": "tanh"}, "must be one of softmax"),
        ({"groups": 8, "group_score": "top_two"}, "must be 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            gating(logits, replace(Gate(1), **change))


@pytest.mark.parametrize("group", [None, 32], ids=["per row", "per 32 columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_rows_are_within_their_bound(dtype: torch.dtype, group: int | None):
    """Each value comes back within max(2^-4 |x|, 2^-10 scale), over 12 orders of magnitude and a short last group."""
    generator = torch.Generator().manual_seed(8)
    spread = torch.logspace(-6, 6, 12)[:, None]
    x = (torch.randn(12, 80, generator=generator) * spread * torch.rand(12, 80, generator=generator) ** 8).to(dtype)
    x[3] = 0
    codes, scale = quantise_rows(x, group)
    back = dequantise_rows(codes, scale, torch.float32, group)
    each = scale.repeat_interleave(group or 80, dim=1)[:, :80]
    bound = torch.maximum(x.float().abs() * 2**-4, each * 2**-10) * (1 + 2**-20)
    assert ((back - x.float()).abs() <= bound).all()
    assert back[3].eq(0).all()


def test_fp8_rows_are_torch_rounding():
    """The codes equal torch's own cast of x / scale, ties and subnormals included."""
    x = torch.cat((torch.linspace(-448, 448, 1793), torch.linspace(-0.05, 0.05, 255)))[None]
    codes, scale = quantise_rows(x)
    assert scale.item() == pytest.approx(1.0)
    expected = (x / scale).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_fp8_rows_with_infinities_are_not_numbers():
    """A row with an infinity or NaN comes back as NaN, and no other row does."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(9))
    x[0, 2], x[2, 7] = torch.inf, torch.nan
    back = dequantise_rows(*quantise_rows(x), torch.float32)
    assert back[0].isnan().all()
    assert back[1].isfinite().all()
    assert back[2].isnan().all()
