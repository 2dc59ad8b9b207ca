"""Checks the GPU kernels on one device: each output must be within a stated bound of an exact result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moiety_kernels.gpu.expert_mlp import ExpertOperands, moe, sorted_expert_mlp
from moiety_kernels.gpu.gating import gating
from moiety_kernels.gpu.models import CLAMPED
from moiety_kernels.gpu.operand import operands_of
from moiety_kernels.gpu.permute import sort_by_expert
from moiety_kernels.gpu.row_fp8 import dequantise_rows, quantise_rows
from moiety_kernels.reference.activation import SWIGLU, Activation, activate
from moiety_kernels.reference.gating import Gate, gating_reference
from moiety_kernels.weights.expert_weights import ExpertWeights
from moiety_kernels.weights.fp8 import Fp8Matrix
from moiety_kernels.weights.int4 import Int4Matrix
from moiety_kernels.weights.int8 import Int8Matrix
from moiety_kernels.weights.matrix import Matrix
from moiety_kernels.weights.mxfp4 import Mxfp4Matrix

# Largest error over the largest output: two products of up to 2048 terms, with one rounding of the row between them.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
KINDS = ("plain", "int8", "int4", "fp8", "mxfp4")


@dataclass(frozen=True, slots=True)
class Checked:
    """One comparison of a kernel's output with the exact result: what was compared, the error and its bound."""

    what: str
    error: float
    bound: float

    @property
    def right(self) -> bool:
        """Whether the error is within the bound; false for an error of NaN."""
        return self.error <= self.bound


def check_all(device: str, small: bool) -> Iterator[Checked]:
    """Checks experts, a whole MoE block, gating, permutation and fp8 rows; yields the result of each comparison.

    Experts are checked in every weight format (plain weights in every dtype of BOUNDS), with few and many rows, and with
    gate and up side by side or interleaved. In each batch one expert has no rows and some tiles are partly filled.
    `small` selects sizes for Triton's interpreter instead of the widths of a real model.
    """
    hidden, inner = (64, 32) if small else (2048, 768)
    batches = ((1, 0, 2), (5, 0, 18)) if small else ((1, 0, 2), (17, 0, 40), (129, 0, 1000))
    for kind in KINDS:
        for dtype in (torch.bfloat16,) if kind != "plain" else BOUNDS:
            for counts in batches:
                for activation in (SWIGLU, CLAMPED):
                    yield _experts(device, kind, dtype, counts, hidden, inner, activation)
    yield _block(device, 3 if small else 200, hidden, inner)
    for name, gate in (
        ("softmax", Gate(4, renormalise=True)),
        ("softmax after", Gate(4, "softmax_after")),
        ("sigmoid in groups", Gate(4, "sigmoid", True, 2.5, 4, 2, "top_two")),
    ):
        logits = torch.randn(5 if small else 1000, 32, device=device)
        index, weights = gating(logits, gate)
        expected, exact = gating_reference(logits.double(), gate)
        wrong = (index.long() != expected).double().mean().item()
        yield Checked(f"gating, {name}: indices", wrong, 0.0)
        yield Checked(f"gating, {name}: weights", (weights - exact).abs().max().item(), 3e-6)
    for tokens in (3, 40 if small else 8192):
        index = torch.randint(-1, 9, (tokens, 8), device=device)
        flat = torch.where((index < 0) | (index > 7), 8, index).flatten()
        order = sort_by_expert(index, 8).order.long()
        wrong = (order != flat.argsort(stable=True)).double().mean().item()
        yield Checked(f"permutation of {tokens} tokens", wrong, 0.0)
    x = torch.randn(4 if small else 1000, hidden, device=device)
    codes, scale = quantise_rows(x)
    bound = torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 2**-20)
    error = ((dequantise_rows(codes, scale, torch.float32) - x).abs() / bound).max().item()
    yield Checked("fp8 rows, over their bound", error, 1.0)


def _weights(device: str, kind: str, dtype: torch.dtype, hidden: int, inner: int, biased: bool) -> ExpertWeights:
    """Returns one random expert in format `kind`."""

    def matrix(rows: int, columns: int) -> Matrix:
        plain = torch.randn(rows, columns, device=device).mul_(columns**-0.5).to(dtype)
        if kind == "plain":
            return plain
        if kind == "mxfp4":
            codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
            exponent = torch.randint(120, 123, (rows, columns // 32), dtype=torch.uint8, device=device)
            return Mxfp4Matrix(codes, exponent)
        if kind == "int4":
            return Int4Matrix.of(plain, 32)
        return Int8Matrix.of(plain) if kind == "int8" else Fp8Matrix.of(plain)

    biases = [torch.randn(size, device=device).to(dtype) for size in (2 * inner, hidden)] if biased else []
    return ExpertWeights(matrix(2 * inner, hidden), matrix(hidden, inner), *biases)


def _exact(rows: torch.Tensor, expert: ExpertWeights, activation: Activation) -> torch.Tensor:
    """Runs `rows` through one expert in float64, with the values that its weights have after quantisation."""
    plain = expert.dequantised(torch.float64)
    assert isinstance(plain.gate_up, torch.Tensor)
    assert isinstance(plain.down, torch.Tensor)
    projected = rows.double() @ plain.gate_up.double().T
    if plain.gate_up_bias is not None:
        projected += plain.gate_up_bias.double()
    out = activate(projected, activation) @ plain.down.double().T
    return out if plain.down_bias is None else out + plain.down_bias.double()


def _experts(
    device: str,
    kind: str,
    dtype: torch.dtype,
    counts: tuple[int, ...],
    hidden: int,
    inner: int,
    activation: Activation,
) -> Checked:
    """Runs sorted rows through random experts with `sorted_expert_mlp`, and compares the outputs with `_exact`."""
    experts = [_weights(device, kind, dtype, hidden, inner, activation is CLAMPED) for _ in counts]
    rows = torch.randn(sum(counts), hidden, device=device).to(dtype)
    offsets, gate_up, down = operands_of(counts, experts)
    out = sorted_expert_mlp(rows, offsets, ExpertOperands(gate_up, down, activation))
    exact = torch.cat([_exact(part, e, activation) for part, e in zip(rows.split(list(counts)), experts, strict=True)])
    error = ((out.double() - exact).abs().max() / exact.abs().max()).item()
    name = f"experts, {kind}, {str(dtype).removeprefix('torch.')}, rows {counts}{', gpt-oss' if activation is CLAMPED else ''}"
    return Checked(name, error, BOUNDS[dtype])


def _block(device: str, tokens: int, hidden: int, inner: int) -> Checked:
    """Runs a whole MoE block (`moe`) in bfloat16, with some experts on other devices, and compares it with `_exact`."""
    dtype = torch.bfloat16
    experts = [_weights(device, "plain", dtype, hidden, inner, False) for _ in range(4)]
    _, gate_up, down = operands_of([0] * 4, experts)
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    index, weights = torch.randint(-1, 5, (tokens, 3), device=device), torch.rand(tokens, 3, device=device)
    out = moe(x, index, weights, ExpertOperands(gate_up, down))
    exact = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
    for number, expert in enumerate(experts):
        share = (weights * (index == number)).sum(1, keepdim=True).double()
        exact += share * _exact(x, expert, SWIGLU)
    return Checked("a whole block", ((out.double() - exact).abs().max() / exact.abs().max()).item(), BOUNDS[dtype])
