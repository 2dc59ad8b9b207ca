"""The grouped GEMMs in Triton's interpreter: layouts, grids, tiles and descriptors change no bit, split sums only rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from expert_cases import KINDS
from triton_cases import BOUND, INTERMEDIATE, error, make_rows, make_weights

from moiety_kernels import SWIGLU, Activation

pytest.importorskip("triton", reason="triton is not installed: pip install 'moiety[gpu]'")

from moiety_kernels.gpu.decode import decode_gemm
from moiety_kernels.gpu.descriptors import describable
from moiety_kernels.gpu.grouped_gemm import grouped_gemm
from moiety_kernels.gpu.operand import operand_of_stack, operands_of
from moiety_kernels.gpu.tiles import Tile

TILE = Tile(16, 16, 32, 4, 2, band=2)  # the smallest tile: many tiles of few rows, and two steps along K


@pytest.mark.parametrize("transposed", [False, True], ids=["[E, out, in]", "[E, in, out]"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["side by side", "interleaved"])
def test_layouts_of_a_checkpoint(transposed: bool, interleaved: bool):
    """One stacked tensor of all experts, in either layout, gives the same bits and is not copied."""
    counts, dtype, activation = (3, 0, 18), torch.float32, Activation(interleaved=interleaved)
    weights = [make_weights(activation, dtype, seed, biased=True) for seed in range(3)]
    rows, out = make_rows(21, dtype), torch.empty(21, INTERMEDIATE)
    offsets, gate_up, _ = operands_of(counts, weights)
    compute = partial(grouped_gemm, rows=21, activation=activation, tile=TILE)
    expected = compute(rows, offsets, gate_up, out).clone()
    tensor = torch.stack([expert.gate_up for expert in weights])
    tensor = tensor.transpose(1, 2).contiguous() if transposed else tensor
    bias = torch.stack([expert.gate_up_bias for expert in weights])
    whole = operand_of_stack(tensor, transposed=transposed, bias=bias)
    assert whole.codes.data_ptr() == tensor.data_ptr()
    assert torch.equal(compute(rows, offsets, whole, out), expected)


def test_grid_and_tiles_change_no_bit():
    """One program for all tiles, one per tile, and tiles of 16 or 32 rows give the same bits."""
    counts = (3, 0, 35, 1)
    weights = [make_weights(SWIGLU, torch.bfloat16, seed) for seed in range(4)]
    offsets, gate_up, _ = operands_of(counts, weights)
    rows = make_rows(39, torch.bfloat16)

    def compute(**options: Any) -> torch.Tensor:
        out = torch.full((39, INTERMEDIATE), torch.nan, dtype=torch.bfloat16)
        return grouped_gemm(rows, offsets, gate_up, out, rows=39, activation=SWIGLU, **options)

    expected = compute(tile=TILE)
    assert torch.equal(compute(tile=TILE, programs=1), expected)
    assert torch.equal(compute(tile=TILE, programs=3), expected)
    assert torch.equal(compute(tile=Tile(32, 32, 32, 4, 2)), expected)


@pytest.mark.parametrize("kind", [KINDS["swiglu"], KINDS["gpt-oss"], KINDS["relu"]], ids=["swiglu", "gpt-oss", "relu"])
@pytest.mark.parametrize("gathered_rows", [False, True], ids=["rows in order", "gathered rows"])
def test_descriptors_change_no_bit(kind: Activation, gathered_rows: bool):
    """Tiles fetched by descriptors give the same bits, also at the ends of rows, columns and K."""
    counts, hidden, inner = (3, 0, 18), 48, 24  # a step and a half of K, a tile and a half of columns
    weights = [make_weights(kind, torch.bfloat16, seed, hidden, inner) for seed in range(3)]
    offsets, gate_up, _ = operands_of(counts, weights)
    rows = make_rows(21, torch.bfloat16, hidden)
    options: dict[str, Any] = {"activation": kind, "rows": 21}
    if gathered_rows:
        options["gather"] = torch.arange(21, dtype=torch.int32).flip(0).contiguous()

    def compute(tile: Tile) -> torch.Tensor:
        return grouped_gemm(rows, offsets, gate_up, torch.full((21, inner), torch.nan).bfloat16(), tile=tile, **options)

    assert describable(rows, gate_up)
    assert torch.equal(compute(replace(TILE, descriptors=True)), compute(TILE))


@pytest.mark.parametrize("split", [2, 3])  # 2: a shorter last part; 3: equal parts
@pytest.mark.parametrize("kind", [KINDS["gpt-oss"], KINDS["relu"]], ids=["gpt-oss", "relu"])
def test_split_sums(kind: Activation, split: int):
    """Split sums are within rounding of the unsplit kernel, repeat bit for bit, and gather and place rows like it."""
    counts, hidden = (2, 0, 17), 96
    weights = [make_weights(kind, torch.float32, seed, hidden) for seed in range(3)]
    offsets, gate_up, _ = operands_of(counts, weights)
    rows = make_rows(10, torch.float32, hidden)
    gather, slots = torch.arange(19, dtype=torch.int32), torch.arange(19, dtype=torch.int32).flip(0).contiguous()
    options: dict[str, Any] = {
        "activation": kind,
        "rows": 19,
        "tile": TILE,
        "gather": gather,
        "gather_by": 2,
        "slots": slots,
    }

    def compute(function: Callable[..., torch.Tensor], **more: Any) -> torch.Tensor:
        return function(rows, offsets, gate_up, torch.full((19, INTERMEDIATE), torch.nan), **options, **more)

    whole, parts = compute(grouped_gemm), compute(decode_gemm, split=split)
    assert error(parts, whole.double()) <= BOUND[torch.float32]
    assert torch.equal(compute(decode_gemm, split=split), parts)
