"""The Triton expert kernels, in Triton's interpreter: invariants, then float64 with a stated bound, then the other backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiety_kernels import ExpertWeights, Fp8Matrix, Mxfp4Matrix, expert_mlp, grouped_expert_mlp
from moiety_kernels.ops.partial_expert_mlp import grouped_partial_mlp
from moiety_kernels.weights.int4 import Int4Matrix

pytest.importorskip("triton", reason="triton is not installed: pip install 'moiety[gpu]'")

from moiety_kernels.gpu.decode import decode_gemm
from moiety_kernels.gpu.descriptors import describable
from moiety_kernels.gpu.expert_mlp import Experts, moe, sorted_expert_mlp
from moiety_kernels.gpu.grouped_gemm import grouped_gemm
from moiety_kernels.gpu.operand import gathered, stacked
from moiety_kernels.gpu.row_fp8 import quantise_rows
from moiety_kernels.gpu.tiles import Tile

HIDDEN, INTERMEDIATE = 64, 32
TILE = Tile(16, 16, 32, 4, 2, band=2)  # the smallest: many tiles of few rows, and two steps along K

COUNTS = {
    "one row": (1,),  # decode of one sequence
    "an empty expert between others": (3, 0, 2),  # held, but no token chose it: it has no tile
    "empty experts at both ends": (0, 5, 0),
    "one hot expert with every row": (0, 0, 33, 0),  # skewed routing: three tiles of one expert
    "uneven tails": (1, 15, 16, 17),  # below, at and past a tile's rows
    "no row at all": (0, 0),
}
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
# Largest error over the largest output, against float64 on the same weights: two products of 64 and 32 terms, and one
# rounding of the row between them to the rows' dtype.
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def options_of(kind: dict[str, Any]) -> dict[str, Any]:
    """What the kernels are told of a kind: biases they see."""
    return {name: value for name, value in kind.items() if name != "biased"}


def make_weights(kind: dict[str, Any], dtype: torch.dtype, seed: int, hidden: int = HIDDEN, inner: int = INTERMEDIATE):
    """One random expert of `kind`, biased where its model's experts are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.15).to(dtype)

    width = inner * (2 if kind.get("gated", True) else 1)
    matrices = normal(width, hidden), normal(hidden, inner)
    return ExpertWeights(*matrices, normal(width), normal(hidden)) if kind.get("biased") else ExpertWeights(*matrices)


def make_rows(count: int, dtype: torch.dtype, hidden: int = HIDDEN, seed: int = 1) -> torch.Tensor:
    """Normally distributed rows."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_float64(rows: torch.Tensor, counts: tuple[int, ...], weights: list[ExpertWeights], kind: dict[str, Any]):
    """The reference, expert by expert, on the same values at twice the precision."""
    outs = []
    for part, expert in zip(rows.double().split(list(counts)), weights, strict=True):
        plain = expert.dequantised(torch.float64)
        wide = (
            None if t is None else t.double() for t in (plain.gate_up, plain.down, plain.gate_up_bias, plain.down_bias)
        )
        outs.append(expert_mlp(part, ExpertWeights(*wide), **options_of(kind)))  # type: ignore[arg-type]
    return torch.cat(outs)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, over the largest output."""
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_shape_of_batch(counts: tuple[int, ...]):
    """Through the entry point of the expert service, each shape is within float32 rounding of float64."""
    rows = make_rows(sum(counts), torch.float32)
    weights = [make_weights({}, torch.float32, seed) for seed in range(len(counts))]
    out = grouped_expert_mlp(rows, counts, weights, backend="triton")
    assert out.shape == rows.shape
    if sum(counts):
        assert error(out, in_float64(rows, counts, weights, {})) <= BOUND[torch.float32]


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
    out = grouped_expert_mlp(rows, counts, weights, backend="triton", **options_of(kind))
    assert out.dtype == dtype
    assert error(out, in_float64(rows, counts, weights, kind)) <= BOUND[dtype]


@pytest.mark.parametrize("kind", [KINDS["gpt-oss"], KINDS["relu"]], ids=["gpt-oss", "relu"])
@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [
        (70, 33),  # no multiple of a tile anywhere: masked ends of rows, columns and K
        (8, 3),  # less than one tile in every direction, starts that no vector load fits
    ],
)
def test_odd_sizes(hidden: int, intermediate: int, kind: dict[str, Any]):
    """Widths that fit no tile are computed to the same bound."""
    counts = (1, 0, 7)
    rows = make_rows(sum(counts), torch.float32, hidden)
    weights = [make_weights(kind, torch.float32, seed, hidden, intermediate) for seed in range(len(counts))]
    out = grouped_expert_mlp(rows, counts, weights, backend="triton", **options_of(kind))
    assert error(out, in_float64(rows, counts, weights, kind)) <= BOUND[torch.float32]


def test_more_experts_than_a_warp_has_lanes():
    """130 experts, most of them empty: tiles are found among any number, no power of two included."""
    counts = [0] * 130
    counts[0], counts[77], counts[129] = 1, 2, 3
    rows = make_rows(6, torch.float32)
    weights = [make_weights({}, torch.float32, seed % 3) for seed in range(130)]
    out = grouped_expert_mlp(rows, counts, weights, backend="triton")
    assert error(out, in_float64(rows, tuple(counts), weights, {})) <= BOUND[torch.float32]


# Against float64 on the same quantised values: what the kernels add to the error of quantising itself.
@pytest.mark.parametrize(
    ("held", "hidden", "intermediate", "dtype"),
    [
        ("int8", 64, 32, torch.bfloat16),
        ("int4 in groups of 32", 64, 32, torch.float32),  # groups as wide as a step: scaled in the sums
        ("int4 in groups of 16", 64, 32, torch.bfloat16),  # narrower: scaled in the weights
        ("int4 in groups of 128", 256, 128, torch.bfloat16),  # wider
        ("int4 with zero points", 64, 64, torch.float32),
        ("fp8", 160, 144, torch.bfloat16),  # edge blocks smaller than 128
        ("fp8 by row", 160, 16, torch.float32),
        ("mxfp4", 96, 32, torch.bfloat16),  # no multiple of a step of 64
    ],
)
def test_quantised_weights(held: str, hidden: int, intermediate: int, dtype: torch.dtype):
    """Each way of holding weights is dequantised in the kernel to the values that `dequantised` states."""
    counts = (1, 0, 3)
    weights = [quantised(make_weights(KINDS["gpt-oss"], dtype, seed, hidden, intermediate), held) for seed in range(3)]
    rows = make_rows(4, dtype, hidden)
    out = grouped_expert_mlp(rows, counts, weights, backend="triton", **options_of(KINDS["gpt-oss"]))
    assert error(out, in_float64(rows, counts, weights, KINDS["gpt-oss"])) <= {**BOUND, torch.float32: 4e-6}[dtype]


def quantised(expert: ExpertWeights, held: str) -> ExpertWeights:
    """`expert` with matrices held as told."""
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
    """Every 4-bit code, exponents about that of the weights: the values need not be those of `matrix`."""
    generator = torch.Generator().manual_seed(matrix.shape[0])
    codes = torch.randint(0, 256, (matrix.shape[0], matrix.shape[1] // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(122, 125, (matrix.shape[0], matrix.shape[1] // 32), generator=generator, dtype=torch.uint8)
    return Mxfp4Matrix(codes, scale)


def with_zero_points(matrix: torch.Tensor) -> Int4Matrix:
    """int4 in groups of 16, each with its own zero."""
    held = Int4Matrix.of(matrix, 16)
    generator = torch.Generator().manual_seed(matrix.shape[0])
    return Int4Matrix(
        held.codes, held.scale, torch.randint(6, 11, held.scale.shape, generator=generator, dtype=torch.uint8)
    )


def test_experts_held_in_different_ways():
    """A batch of plain, int8 and int4 experts: each row through its own, as mixed precision per expert needs."""
    plain = [make_weights({}, torch.float32, seed) for seed in range(3)]
    weights = [plain[0], plain[1].quantised(), plain[2].quantised(4, 32)]
    rows, counts = make_rows(6, torch.float32), (1, 2, 3)
    out = grouped_expert_mlp(rows, counts, weights, backend="triton")
    assert error(out, in_float64(rows, counts, weights, {})) <= 4e-6


def test_partial_sums_are_not_rounded():
    """Slices' outputs in bfloat16 rows come back as the float32 sums they are: rounded, they are the rows of whole experts."""
    plain = [make_weights({}, torch.bfloat16, seed) for seed in range(3)]
    weights = [plain[0], plain[1].quantised(), plain[2]]
    rows, counts = make_rows(6, torch.bfloat16), (1, 2, 3)
    out = grouped_partial_mlp(rows, counts, weights, backend="triton")
    assert out.dtype == torch.float32
    assert error(out, in_float64(rows, counts, weights, {})) <= BOUND[torch.bfloat16]
    assert torch.equal(out.bfloat16(), grouped_expert_mlp(rows, counts, weights, backend="triton"))


def test_fp8_rows_with_fp8_weights():
    """Rows and weights both in fp8, as DeepSeek computes: within bfloat16's bound of float64 on these values."""
    hidden, counts = 256, (2, 0, 15)
    weights = [quantised(make_weights({}, torch.bfloat16, seed, hidden, 128), "fp8") for seed in range(3)]
    codes, scale = quantise_rows(make_rows(17, torch.bfloat16, hidden))
    offsets, gate_up, down = gathered(counts, weights)
    out = sorted_expert_mlp(codes, offsets, Experts(gate_up, down), x_scale=scale[:, 0], dtype=torch.bfloat16)
    assert error(out, in_float64(codes.double() * scale, counts, weights, {})) <= BOUND[torch.bfloat16]


@pytest.mark.parametrize("transposed", [False, True], ids=["[E, out, in]", "[E, in, out]"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["side by side", "interleaved"])
def test_layouts_of_a_checkpoint(transposed: bool, interleaved: bool):
    """One stacked tensor of all experts in either layout: the same result to the bit, and nothing is copied."""
    counts, dtype = (3, 0, 18), torch.float32
    weights = [make_weights({"biased": True}, dtype, seed) for seed in range(3)]
    rows, out = make_rows(21, dtype), torch.empty(21, INTERMEDIATE)
    offsets, gate_up, _ = gathered(counts, weights)
    options: dict[str, Any] = {"activation": "silu", "gated": True, "interleaved": interleaved, "tile": TILE}
    expected = grouped_gemm(rows, offsets, gate_up, out, rows=21, **options).clone()
    tensor = torch.stack([expert.gate_up for expert in weights])
    tensor = tensor.transpose(1, 2).contiguous() if transposed else tensor
    bias = torch.stack([expert.gate_up_bias for expert in weights])
    whole = stacked(tensor, transposed=transposed, bias=bias)
    assert whole.codes.data_ptr() == tensor.data_ptr()
    assert torch.equal(grouped_gemm(rows, offsets, whole, out, rows=21, **options), expected)


def test_grid_and_tiles_change_no_bit():
    """One program that computes every tile in turn, a program each, rows in tiles of 16 or 32: the same bits."""
    counts = (3, 0, 35, 1)
    weights = [make_weights({}, torch.bfloat16, seed) for seed in range(4)]
    offsets, gate_up, _ = gathered(counts, weights)
    rows = make_rows(39, torch.bfloat16)

    def compute(**options: Any) -> torch.Tensor:
        out = torch.full((39, INTERMEDIATE), torch.nan, dtype=torch.bfloat16)
        return grouped_gemm(rows, offsets, gate_up, out, rows=39, activation="silu", gated=True, **options)

    expected = compute(tile=TILE)
    assert torch.equal(compute(tile=TILE, programs=1), expected)
    assert torch.equal(compute(tile=TILE, programs=3), expected)
    assert torch.equal(compute(tile=Tile(32, 32, 32, 4, 2)), expected)


@pytest.mark.parametrize("kind", [KINDS["swiglu"], KINDS["gpt-oss"], KINDS["relu"]], ids=["swiglu", "gpt-oss", "relu"])
@pytest.mark.parametrize("gathered_rows", [False, True], ids=["rows in order", "gathered rows"])
def test_descriptors_change_no_bit(kind: dict[str, Any], gathered_rows: bool):
    """Tiles fetched by descriptors hold the same values, past the ends of rows, columns and K too: the same bits."""
    counts, hidden, inner = (3, 0, 18), 48, 24  # a step and a half of K, a tile and a half of columns
    weights = [make_weights(kind, torch.bfloat16, seed, hidden, inner) for seed in range(3)]
    offsets, gate_up, _ = gathered(counts, weights)
    rows = make_rows(21, torch.bfloat16, hidden)
    options: dict[str, Any] = {"gated": True, **options_of(kind), "rows": 21}
    if gathered_rows:
        options["gather"] = torch.arange(21, dtype=torch.int32).flip(0).contiguous()

    def compute(tile: Tile) -> torch.Tensor:
        return grouped_gemm(rows, offsets, gate_up, torch.full((21, inner), torch.nan).bfloat16(), tile=tile, **options)

    assert describable(rows, gate_up)
    assert torch.equal(compute(replace(TILE, descriptors=True)), compute(TILE))


@pytest.mark.parametrize("split", [2, 3])  # a last part that is shorter, and even ones
@pytest.mark.parametrize("kind", [KINDS["gpt-oss"], KINDS["relu"]], ids=["gpt-oss", "relu"])
def test_split_sums(kind: dict[str, Any], split: int):
    """K in parts: within rounding of the unsplit kernel, the same bits every time, rows gathered and placed alike."""
    counts, hidden = (2, 0, 17), 96
    weights = [make_weights(kind, torch.float32, seed, hidden) for seed in range(3)]
    offsets, gate_up, _ = gathered(counts, weights)
    rows = make_rows(10, torch.float32, hidden)
    gather, slots = torch.arange(19, dtype=torch.int32), torch.arange(19, dtype=torch.int32).flip(0).contiguous()
    options: dict[str, Any] = {
        **options_of(kind),
        "rows": 19,
        "tile": TILE,
        "gather": gather,
        "gather_by": 2,
        "slots": slots,
    }
    options.setdefault("gated", True)

    def compute(function: Callable[..., torch.Tensor], **more: Any) -> torch.Tensor:
        return function(rows, offsets, gate_up, torch.full((19, INTERMEDIATE), torch.nan), **options, **more)

    whole, parts = compute(grouped_gemm), compute(decode_gemm, split=split)
    assert error(parts, whole.double()) <= BOUND[torch.float32]
    assert torch.equal(compute(decode_gemm, split=split), parts)


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any), kind=st.sampled_from(sorted(KINDS)))
def test_deterministic_bits_do_not_depend_on_the_batch(counts: list[int], kind: str):
    """A row's result is the same to the bit alone and among any number of others."""
    rows = make_rows(sum(counts), torch.bfloat16, seed=sum(counts))
    weights = [make_weights(KINDS[kind], torch.bfloat16, seed) for seed in range(len(counts))]
    options = {**options_of(KINDS[kind]), "deterministic": True, "backend": "triton"}
    together = grouped_expert_mlp(rows, counts, weights, **options)
    expert_of = [expert for expert, count in enumerate(counts) for _ in range(count)]
    row = len(rows) // 2
    alone = grouped_expert_mlp(rows[row : row + 1], (1,), [weights[expert_of[row]]], **options)
    assert torch.equal(alone[0], together[row])


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the infinity that is put in
def test_what_is_no_number_stays_in_its_row():
    """An infinity or NaN in one row spoils that row only, although rows share tiles and spare rows repeat one."""
    rows = make_rows(4, torch.float32)
    rows[0, 3], rows[3, 5] = torch.inf, torch.nan
    out = grouped_expert_mlp(rows, (4,), [make_weights({}, torch.float32, 0)], backend="triton")
    assert not out[0].isfinite().all()
    assert not out[3].isfinite().any()
    clean = rows.clone()
    clean[0], clean[3] = 0, 0
    expected = grouped_expert_mlp(clean, (4,), [make_weights({}, torch.float32, 0)], backend="triton")
    assert torch.equal(out[1:3], expected[1:3])


@settings(deadline=None, max_examples=6)
@given(
    tokens=st.integers(1, 6),
    top_k=st.integers(1, 8),  # 1: nothing to sum; 8: most models' largest
    experts=st.sampled_from([1, 3, 8]),  # fewer than K too: a token may choose an expert twice
    seed=st.integers(0, 100),
)
def test_a_whole_block(tokens: int, top_k: int, experts: int, seed: int):
    """From top-k indices to summed outputs, some experts not here: within rounding of a float64 loop over tokens."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)  # -1 and E: held elsewhere
    routing = torch.rand(tokens, top_k, generator=generator)
    x = make_rows(tokens, torch.float32, seed=seed)
    weights = [make_weights({}, torch.float32, number) for number in range(experts)]
    _, gate_up, down = gathered([0] * experts, weights)
    out = moe(x, index, routing, Experts(gate_up, down))
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for token in range(tokens):
        for k in range(top_k):
            if 0 <= (expert := int(index[token, k])) < experts:
                row = in_float64(x[token : token + 1], (1,), [weights[expert]], {})[0]
                expected[token] += routing[token, k].double() * row
    assert (out.double() - expected).abs().max() <= 3e-6 * max(expected.abs().max().item(), 1e-3)


def test_groups_that_fit_no_step_are_refused():
    """int4 scales over a number of columns that no tile can follow are an error that says what would do."""
    weights = [make_weights({}, torch.float32, 0, 60, 60).quantised(4, 12)]
    with pytest.raises(ValueError, match="groups of 12 columns"):
        grouped_expert_mlp(make_rows(1, torch.float32, 60), (1,), weights, backend="triton")
