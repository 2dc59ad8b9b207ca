"""The Triton expert kernels in Triton's interpreter: against float64 with a stated bound, and invariants."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from expert_cases import KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_cases import BOUND, HIDDEN, error, in_float64, make_rows, make_weights

from moiety_kernels import SWIGLU, Activation, ExpertWeights, Fp8Matrix, Mxfp4Matrix, grouped_expert_mlp
from moiety_kernels.weights.int4 import Int4Matrix

pytest.importorskip("triton", reason="triton is not installed: pip install 'moiety[gpu]'")

from moiety_kernels.gpu.expert_mlp import ExpertOperands, moe, sorted_expert_mlp
from moiety_kernels.gpu.operand import operands_of
from moiety_kernels.gpu.row_fp8 import quantise_rows

COUNTS = {
    "one row": (1,),  # decode of one sequence
    "an empty expert between others": (3, 0, 2),  # no token chose it, so it has no tile
    "empty experts at both ends": (0, 5, 0),
    "one hot expert with every row": (0, 0, 33, 0),  # skewed routing: three tiles of one expert
    "uneven tails": (1, 15, 16, 17),  # below, at and past a tile's rows
    "no row at all": (0, 0),
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_shape_of_batch(counts: tuple[int, ...]):
    """Every batch shape is within float32 rounding of float64, through the expert service's entry point."""
    rows = make_rows(sum(counts), torch.float32)
    weights = [make_weights(SWIGLU, torch.float32, seed) for seed in range(len(counts))]
    out = grouped_expert_mlp(rows, counts, weights, backend="triton")
    assert out.shape == rows.shape
    if sum(counts):
        assert error(out, in_float64(rows, counts, weights, SWIGLU)) <= BOUND[torch.float32]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in KINDS),
        ("gpt-oss", torch.float32),
        ("gelu", torch.float32),
        ("swiglu", torch.float16),
    ],
    ids=str,
)
def test_every_kind_of_expert(name: str, dtype: torch.dtype):
    """Every activation, gated or not, interleaved or side by side, stays within the bound of its dtype."""
    kind = KINDS[name]
    counts = (2, 0, 3)
    rows = make_rows(sum(counts), dtype)
    weights = [make_weights(kind, dtype, seed) for seed in range(len(counts))]
    out = grouped_expert_mlp(rows, counts, weights, kind, backend="triton")
    assert out.dtype == dtype
    assert error(out, in_float64(rows, counts, weights, kind)) <= BOUND[dtype]


@pytest.mark.parametrize("kind", [KINDS["gpt-oss"], KINDS["relu"]], ids=["gpt-oss", "relu"])
@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [
        (70, 33),  # no multiple of a tile in any direction: masked ends of rows, columns and K
        (8, 3),  # less than one tile in every direction, starts that are not aligned for vector loads
    ],
)
def test_odd_sizes(hidden: int, intermediate: int, kind: Activation):
    """Widths that are no multiple of a tile meet the same bound."""
    counts = (1, 0, 7)
    rows = make_rows(sum(counts), torch.float32, hidden)
    weights = [make_weights(kind, torch.float32, seed, hidden, intermediate) for seed in range(len(counts))]
    out = grouped_expert_mlp(rows, counts, weights, kind, backend="triton")
    assert error(out, in_float64(rows, counts, weights, kind)) <= BOUND[torch.float32]


def test_more_experts_than_a_warp_has_lanes():
    """Tiles are found among 130 experts, most of them empty: more than a warp's lanes, and no power of two."""
    counts = [0] * 130
    counts[0], counts[77], counts[129] = 1, 2, 3
    rows = make_rows(6, torch.float32)
    weights = [make_weights(SWIGLU, torch.float32, seed % 3) for seed in range(130)]
    out = grouped_expert_mlp(rows, counts, weights, backend="triton")
    assert error(out, in_float64(rows, tuple(counts), weights, SWIGLU)) <= BOUND[torch.float32]


# Compared with float64 on the same quantised values, so without the error of quantising itself.
@pytest.mark.parametrize(
    ("held", "hidden", "intermediate", "dtype"),
    [
        ("int8", 64, 32, torch.bfloat16),
        ("int4 in groups of 32", 64, 32, torch.float32),  # groups as wide as a step: scales multiply the sums
        ("int4 in groups of 16", 64, 32, torch.bfloat16),  # narrower than a step: scales multiply the weights
        ("int4 in groups of 128", 256, 128, torch.bfloat16),  # wider than a step
        ("int4 with zero points", 64, 64, torch.float32),
        ("fp8", 160, 144, torch.bfloat16),  # edge blocks smaller than 128
        ("fp8 by row", 160, 16, torch.float32),
        ("mxfp4", 96, 32, torch.bfloat16),  # 96 columns are no multiple of a step of 64
    ],
)
def test_quantised_weights(held: str, hidden: int, intermediate: int, dtype: torch.dtype):
    """The kernel dequantises each weight format to the values that `dequantised` returns."""
    counts = (1, 0, 3)
    weights = [quantised(make_weights(KINDS["gpt-oss"], dtype, seed, hidden, intermediate), held) for seed in range(3)]
    rows = make_rows(4, dtype, hidden)
    out = grouped_expert_mlp(rows, counts, weights, KINDS["gpt-oss"], backend="triton")
    assert error(out, in_float64(rows, counts, weights, KINDS["gpt-oss"])) <= {**BOUND, torch.float32: 4e-6}[dtype]


def quantised(expert: ExpertWeights, held: str) -> ExpertWeights:
    """Returns `expert` with its matrices in format `held`."""
    biases = expert.gate_up_bias, expert.down_bias
    matrices = expert.gate_up, expert.down
    assert all(isinstance(matrix, torch.Tensor) for matrix in matrices)
    if held == "int8":
        return expert.quantised()
    if held.startswith("int4 in groups of "):
        return expert.quantised(4, int(held.split()[-1]))
    make: Callable[[torch.Tensor], Any]
    if held == "fp8":
        make = Fp8Matrix.of
    elif held == "fp8 by row":
        make = lambda matrix: Fp8Matrix.of(matrix).by_row()  # noqa: E731
    elif held == "mxfp4":
        make = random_mxfp4
    else:
        make = with_zero_points
    return ExpertWeights(make(matrices[0]), make(matrices[1]), *biases)  # type: ignore[arg-type]


def random_mxfp4(matrix: torch.Tensor) -> Mxfp4Matrix:
    """Returns random codes and plausible exponents in the shape of `matrix`, not its values."""
    generator = torch.Generator().manual_seed(matrix.shape[0])
    codes = torch.randint(0, 256, (matrix.shape[0], matrix.shape[1] // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(122, 125, (matrix.shape[0], matrix.shape[1] // 32), generator=generator, dtype=torch.uint8)
    return Mxfp4Matrix(codes, scale)


def with_zero_points(matrix: torch.Tensor) -> Int4Matrix:
    """Returns int4 in groups of 16, each with a random zero point."""
    held = Int4Matrix.of(matrix, 16)
    generator = torch.Generator().manual_seed(matrix.shape[0])
    return Int4Matrix(
        held.codes, held.scale, torch.randint(6, 11, held.scale.shape, generator=generator, dtype=torch.uint8)
    )


def test_experts_held_in_different_ways():
    """In a batch of plain, int8 and int4 experts, each row goes through its own expert."""
    plain = [make_weights(SWIGLU, torch.float32, seed) for seed in range(3)]
    weights = [plain[0], plain[1].quantised(), plain[2].quantised(4, 32)]
    rows, counts = make_rows(6, torch.float32), (1, 2, 3)
    out = grouped_expert_mlp(rows, counts, weights, backend="triton")
    assert error(out, in_float64(rows, counts, weights, SWIGLU)) <= 4e-6


def test_partial_sums_are_not_rounded():
    """Partial outputs of bfloat16 rows are float32 sums; rounded, they equal the outputs of whole experts."""
    plain = [make_weights(SWIGLU, torch.bfloat16, seed) for seed in range(3)]
    weights = [plain[0], plain[1].quantised(), plain[2]]
    rows, counts = make_rows(6, torch.bfloat16), (1, 2, 3)
    out = grouped_expert_mlp(rows, counts, weights, dtype=torch.float32, backend="triton")
    assert out.dtype == torch.float32
    assert error(out, in_float64(rows, counts, weights, SWIGLU)) <= BOUND[torch.bfloat16]
    assert torch.equal(out.bfloat16(), grouped_expert_mlp(rows, counts, weights, backend="triton"))


def test_fp8_rows_with_fp8_weights():
    """fp8 rows times fp8 weights, as in DeepSeek, stay within bfloat16's bound of float64 on the same values."""
    hidden, counts = 256, (2, 0, 15)
    weights = [quantised(make_weights(SWIGLU, torch.bfloat16, seed, hidden, 128), "fp8") for seed in range(3)]
    codes, scale = quantise_rows(make_rows(17, torch.bfloat16, hidden))
    offsets, gate_up, down = operands_of(counts, weights)
    out = sorted_expert_mlp(codes, offsets, ExpertOperands(gate_up, down), x_scale=scale[:, 0], dtype=torch.bfloat16)
    assert error(out, in_float64(codes.double() * scale, counts, weights, SWIGLU)) <= BOUND[torch.bfloat16]


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any), kind=st.sampled_from(sorted(KINDS)))
def test_deterministic_bits_do_not_depend_on_the_batch(counts: list[int], kind: str):
    """With `deterministic` a row has the same bits alone and among other rows."""
    rows = make_rows(sum(counts), torch.bfloat16, seed=sum(counts))
    weights = [make_weights(KINDS[kind], torch.bfloat16, seed) for seed in range(len(counts))]
    compute = partial(grouped_expert_mlp, activation=KINDS[kind], deterministic=True, backend="triton")
    together = compute(rows, counts, weights)
    expert_of = [expert for expert, count in enumerate(counts) for _ in range(count)]
    row = len(rows) // 2
    alone = compute(rows[row : row + 1], (1,), [weights[expert_of[row]]])
    assert torch.equal(alone[0], together[row])


@pytest.mark.filterwarnings("ignore:invalid value")  # from numpy, about the infinity
def test_what_is_no_number_stays_in_its_row():
    """An infinity or NaN in one row affects only that row, although rows share tiles and spare rows repeat one."""
    rows = make_rows(4, torch.float32)
    rows[0, 3], rows[3, 5] = torch.inf, torch.nan
    out = grouped_expert_mlp(rows, (4,), [make_weights(SWIGLU, torch.float32, 0)], backend="triton")
    assert not out[0].isfinite().all()
    assert not out[3].isfinite().any()
    clean = rows.clone()
    clean[0], clean[3] = 0, 0
    expected = grouped_expert_mlp(clean, (4,), [make_weights(SWIGLU, torch.float32, 0)], backend="triton")
    assert torch.equal(out[1:3], expected[1:3])


@settings(deadline=None, max_examples=6)
@given(
    tokens=st.integers(1, 6),
    top_k=st.integers(1, 8),  # 1: nothing to sum; 8: most models' largest
    experts=st.sampled_from([1, 3, 8]),  # also fewer than K: a token may choose an expert twice
    seed=st.integers(0, 100),
)
def test_a_whole_block(tokens: int, top_k: int, experts: int, seed: int):
    """A whole block with some experts on other devices is within rounding of a float64 loop over tokens."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)  # -1 and E: held elsewhere
    routing = torch.rand(tokens, top_k, generator=generator)
    x = make_rows(tokens, torch.float32, seed=seed)
    weights = [make_weights(SWIGLU, torch.float32, number) for number in range(experts)]
    _, gate_up, down = operands_of([0] * experts, weights)
    out = moe(x, index, routing, ExpertOperands(gate_up, down))
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for token in range(tokens):
        for k in range(top_k):
            if 0 <= (expert := int(index[token, k])) < experts:
                row = in_float64(x[token : token + 1], (1,), [weights[expert]], SWIGLU)[0]
                expected[token] += routing[token, k].double() * row
    assert (out.double() - expected).abs().max() <= 3e-6 * max(expected.abs().max().item(), 1e-3)


def test_groups_that_fit_no_step_are_refused():
    """int4 groups of a width that fits no tile raise an error that names the width."""
    weights = [make_weights(SWIGLU, torch.float32, 0, 60, 60).quantised(4, 12)]
    with pytest.raises(ValueError, match="groups of 12 columns"):
        grouped_expert_mlp(make_rows(1, torch.float32, 60), (1,), weights, backend="triton")
