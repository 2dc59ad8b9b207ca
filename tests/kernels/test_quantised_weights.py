"""Quantised matrices have the values of the published formulas, and kernels compute them within stated bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_cases import BOUND, KINDS, LOOSER, in_float64, make_weights, one_at_a_time
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiety_kernels import SWIGLU, ExpertWeights, Fp8Matrix, Int4Matrix, Int8Matrix, Mxfp4Matrix, grouped_expert_mlp
from moiety_kernels.weights.matrix import QuantisedMatrix
from moiety_kernels.weights.matrix_ops import concatenate
from moiety_kernels.weights.nibbles import pack_nibbles, unpack_nibbles


def random_int4(rows: int, columns: int, group: int, scales: torch.dtype, zeros: bool, seed: int) -> Int4Matrix:
    """Returns random codes and zero points, with scales of realistic size."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
    scale = (torch.rand(rows, columns // group, generator=generator) * 0.03 + 0.005).to(scales)
    zero = torch.randint(0, 16, scale.shape, generator=generator).to(torch.uint8) if zeros else None
    return Int4Matrix(codes, scale, zero)


def random_fp8(rows: int, columns: int, block_rows: int, seed: int) -> Fp8Matrix:
    """Returns random finite codes, with scales of realistic size."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, (rows, columns), generator=generator)
    codes += 128 * torch.randint(0, 2, codes.shape, generator=generator)
    grid = -(-rows // block_rows), -(-columns // 128)
    scale = torch.rand(grid, generator=generator) * 1e-3 + 1e-4
    return Fp8Matrix(codes.to(torch.uint8).view(torch.float8_e4m3fn), scale, block_rows)


def random_mxfp4(rows: int, columns: int, seed: int) -> Mxfp4Matrix:
    """Returns random codes, with exponents of realistic size."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
    return Mxfp4Matrix(codes, torch.randint(118, 124, (rows, columns // 32), generator=generator).to(torch.uint8))


Make = Callable[[int, int, int], QuantisedMatrix]
HELD: dict[str, Make] = {
    "int8": lambda rows, columns, seed: Int8Matrix.of(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1
    ),
    "int8, rows rounded": lambda rows, columns, seed: Int8Matrix.of(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1, rounds_rows=True
    ),
    "int4, groups of 32": lambda rows, columns, seed: random_int4(rows, columns, 32, torch.bfloat16, False, seed),
    "int4, groups of 64 with zero points": lambda rows, columns, seed: random_int4(
        rows, columns, 64, torch.float16, True, seed
    ),
    "int4, one group a row": lambda rows, columns, seed: random_int4(rows, columns, columns, torch.float16, True, seed),
    "fp8": lambda rows, columns, seed: random_fp8(rows, columns, 128, seed),
    "fp8, scales by row": lambda rows, columns, seed: random_fp8(rows, columns, 1, seed),
    "mxfp4": random_mxfp4,
}


def values_in_float64(matrix: QuantisedMatrix) -> torch.Tensor:
    """Computes the published formula value by value in Python, without the code under test."""
    rows, columns = matrix.shape
    out = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            out[row, column] = one_value(matrix, row, column)
    return out


def one_value(matrix: QuantisedMatrix, row: int, column: int) -> float:
    """Returns the value at (row, column)."""
    codes = matrix.tensors[0].view(torch.uint8)
    if isinstance(matrix, Int8Matrix):
        return (int(codes[row, column]) - 128) * float(matrix.scale[row])
    if isinstance(matrix, Fp8Matrix):
        byte = int(codes[row, column])
        exponent, fraction = byte >> 3 & 15, byte & 7
        size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        return (-size if byte & 128 else size) * float(matrix.scale[row // matrix.block_rows, column // 128])
    code = int(codes[row, column // 2]) >> (4 * (column % 2)) & 15
    if isinstance(matrix, Mxfp4Matrix):
        size = (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7]
        return (-size if code & 8 else size) * 2.0 ** (int(matrix.scale[row, column // 32]) - 127)
    assert isinstance(matrix, Int4Matrix)
    group = column // matrix.group
    return (code - (8 if matrix.zero is None else int(matrix.zero[row, group]))) * float(matrix.scale[row, group])


@pytest.mark.parametrize("make", HELD.values(), ids=HELD)
def test_dequantised_values_are_the_published_formulas(make: Make):
    """A dequantised value is its formula's, rounded once, also in the edge blocks of fp8 (rows 130 = 128 + 2)."""
    matrix = make(130, 192, 1)
    expected = values_in_float64(matrix)
    assert matrix.shape == (130, 192)
    assert torch.equal(matrix.dequantised(torch.float32), expected.float())
    assert torch.equal(matrix.dequantised(torch.bfloat16), expected.float().bfloat16())


CASES = {
    "decode of one sequence, less than one step of 128 columns": ((64, 64), (1,)),
    "an expert without rows between others, a whole step and one and a half": ((128, 192), (3, 0, 2)),
    "every height of a row tile and past it, several scales, masked ends": ((192, 320), (1, 5, 6, 7)),
    "one hot expert with every row, deeper than one part of a product": ((1280, 64), (0, 0, 17, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(("shape", "counts"), CASES.values(), ids=CASES)
def test_experts_are_within_rounding_of_their_values(
    kernels: str, shape: tuple[int, int], counts: tuple[int, ...], held: str, dtype: torch.dtype
):
    """Weight-only kernels are as close to float64 on the same values as kernels of plain weights."""
    hidden, intermediate = shape
    kind = KINDS["gpt-oss"] if held == "mxfp4" else KINDS["swiglu"]
    make = HELD[held]
    generator = torch.Generator().manual_seed(3)

    def bias(width: int) -> torch.Tensor | None:
        return torch.randn(width, generator=generator).to(dtype) if kind.interleaved else None

    weights = [
        ExpertWeights(
            make(2 * intermediate, hidden, 2 * e),
            make(hidden, intermediate, 2 * e + 1),
            bias(2 * intermediate),
            bias(hidden),
        )
        for e in range(len(counts))
    ]
    rows = torch.randn(sum(counts), hidden, generator=generator).to(dtype)
    out = grouped_expert_mlp(rows, counts, weights, kind)
    plain = [expert.dequantised(torch.float64) for expert in weights]
    expected = one_at_a_time(rows.double(), counts, [in_float64(expert) for expert in plain], kind)
    bound = BOUND[dtype] * LOOSER[kernels]
    if kernels == "C++" and held == "int8, rows rounded":
        bound = 3e-2
    elif kernels == "torch" and dtype == torch.bfloat16:  # weights are rounded to the rows' dtype
        bound *= 2
    assert (out.double() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("held", HELD)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any))
def test_bits_do_not_depend_on_the_batch(kernels: str, held: str, counts: list[int]):
    """With `deterministic` a row has the same bits alone and among other rows, in every weight format."""
    make = HELD[held]
    weights = [ExpertWeights(make(128, 192, 2 * e), make(192, 64, 2 * e + 1)) for e in range(len(counts))]
    rows = torch.randn(sum(counts), 192, generator=torch.Generator().manual_seed(sum(counts))).bfloat16()
    together = grouped_expert_mlp(rows, counts, weights, deterministic=True)
    expert_of = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row in {0, len(rows) // 2, len(rows) - 1}:
        alone = grouped_expert_mlp(rows[row : row + 1], (1,), [weights[expert_of[row]]], deterministic=True)
        assert torch.equal(alone[0], together[row])


def test_experts_held_in_different_ways_share_a_batch(kernels: str):
    """In a batch of mixed formats, each expert gives the bits that it gives alone."""
    counts = (2, 3, 0, 1, 4)
    plain = [make_weights(SWIGLU, torch.bfloat16, seed, 128, 64) for seed in range(5)]
    weights = [plain[0], plain[1].quantised(4), plain[2], plain[3].quantised(8), plain[4].quantised(4, group=32)]
    rows = torch.randn(sum(counts), 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = grouped_expert_mlp(rows, counts, weights, deterministic=True)
    parts = zip(rows.split(list(counts)), counts, weights, strict=True)
    alone = [grouped_expert_mlp(part, (count,), [expert], deterministic=True) for part, count, expert in parts]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(("bits", "bound", "size"), [(8, 0.02, 0.51), (4, 0.2, 0.27)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_experts_are_within_their_bound(
    kernels: str, dtype: torch.dtype, bits: int, bound: float, size: float
):
    """For noise-like weights, outputs change by at most 2 % with 8 bits and 20 % with 4, and memory is as documented."""
    weights = make_weights(SWIGLU, dtype, 1, 512, 192)
    rows = torch.randn(13, 512, generator=torch.Generator().manual_seed(4)).to(dtype)
    quantised = weights.quantised(bits)
    out = grouped_expert_mlp(rows, (13,), [quantised])
    expected = one_at_a_time(rows.double(), (13,), [in_float64(weights)], SWIGLU)
    assert (out.double() - expected).norm() <= bound * expected.norm()
    assert quantised.nbytes <= size * weights.nbytes * (2 / dtype.itemsize)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 6), pairs=st.integers(1, 40), seed=st.integers(0, 99))
def test_nibbles_come_back(rows: int, pairs: int, seed: int):
    """Unpacking packed four-bit codes returns them unchanged."""
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize("rows", [(128, 128), (40, 40), (128, 40), (40, 128)])
def test_joined_fp8_keeps_every_scale(rows: tuple[int, int]):
    """Joined matrices keep their values, also where a matrix does not end at a block boundary."""
    parts = [random_fp8(count, 192, 128, seed) for seed, count in enumerate(rows)]
    expected = torch.cat([part.dequantised(torch.float32) for part in parts])
    assert torch.equal(concatenate(parts).dequantised(torch.float32), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2)), "codes is torch.int8"),
        ((torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(3)), r"scale is torch.float32 \[3\]: must be"),
        ((torch.zeros(8, 2, dtype=torch.uint8).T, torch.zeros(2)), "not contiguous"),
    ],
)
def test_what_cpp_could_not_read_is_refused(arguments: tuple[Any, ...], message: str):
    """A tensor of another dtype, shape or stride raises ValueError when the matrix is made."""
    with pytest.raises(ValueError, match=message):
        Int8Matrix(*arguments)


def test_columns_that_are_no_groups_are_refused():
    """int4 raises ValueError where the columns are no whole number of groups."""
    with pytest.raises(ValueError, match="40 columns cannot be groups of 64"):
        make_weights(SWIGLU, torch.float32, 0).quantised(4)
