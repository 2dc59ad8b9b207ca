"""Shapes for compiling and measuring kernels: MoE blocks of four published models, with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moiety_kernels.gpu.expert_mlp import ExpertOperands
from moiety_kernels.gpu.operand import Operand, operand_of_stack
from moiety_kernels.reference.activation import Activation
from moiety_kernels.reference.gating import Gate

CLAMPED = Activation("swiglu_clamped", interleaved=True, limit=7.0, alpha=1.702)  # gpt-oss


@dataclass(frozen=True, slots=True)
class Model:
    """One MoE block, or the part of it that one device holds."""

    name: str
    experts: int  # on this device
    choices: int  # experts of the whole model, among which the gate chooses
    hidden: int
    intermediate: int
    gate: Gate
    kind: str = "int8"  # weight format for the quantised measurement
    clamped: bool = False  # gpt-oss: interleaved, biased, clamped activation

    def flops(self, rows: int) -> int:
        """Returns the FLOPs of `rows` rows: a multiply and an add for each weight of one expert's gate, up and down matrix."""
        return 6 * rows * self.hidden * self.intermediate


MODELS = (
    Model("Mixtral 8x7B", 8, 8, 4096, 14336, Gate(2, renormalise=True)),
    Model("Qwen3-30B-A3B", 128, 128, 2048, 768, Gate(8, renormalise=True), "int4"),
    Model(
        "DeepSeek-V3 (32 of 256)",
        32,
        256,
        7168,
        2048,
        Gate(8, "sigmoid", True, 2.5, groups=8, kept_groups=4, group_score="top_two"),
        "fp8",
    ),
    Model("gpt-oss-120b", 128, 128, 2880, 2880, Gate(4, "softmax_after"), "mxfp4", clamped=True),
)


def experts_of(model: Model, dtype: torch.dtype, kind: str, device: str) -> ExpertOperands:
    """Returns random experts of the shape of `model`, in format `kind`, with biases where the model has them."""
    gate_up = _matrices(model, 2 * model.intermediate, model.hidden, dtype, kind, device)
    down = _matrices(model, model.hidden, model.intermediate, dtype, kind, device)
    if model.clamped:
        return ExpertOperands(gate_up, down, CLAMPED)
    return ExpertOperands(gate_up, down)


def _matrices(model: Model, rows: int, columns: int, dtype: torch.dtype, kind: str, device: str) -> Operand:
    shape = (model.experts, rows)

    def filled(*sizes: int, of: torch.dtype, value: float) -> torch.Tensor:
        return torch.full((*shape, *sizes), value, dtype=of, device=device)

    def codes(width: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, width), dtype=torch.uint8, device=device)

    bias = filled(of=dtype, value=0.01) if model.clamped else None
    size = columns**-0.5  # of the weights, so that outputs are about as large as inputs
    if kind == "plain":
        return operand_of_stack(torch.randn(*shape, columns, dtype=dtype, device=device).mul_(size), bias=bias)
    if kind == "fp8":
        values = torch.randn(*shape, columns, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn)
        blocks = torch.full((model.experts, -(-rows // 128), -(-columns // 128)), size, device=device)
        return operand_of_stack(values, kind=kind, scale=blocks, bias=bias)
    if kind == "int8":
        return operand_of_stack(codes(columns), kind=kind, scale=filled(of=torch.float32, value=size / 74), bias=bias)
    if kind == "int4":
        group = min(64, columns)
        scale = filled(columns // group, of=torch.float16, value=size / 4.6)
        return operand_of_stack(codes(columns // 2), kind=kind, scale=scale, bias=bias)
    exponent = 127 + round(torch.tensor(size / 2.6).log2().item())
    return operand_of_stack(
        codes(columns // 2), kind=kind, scale=filled(columns // 32, of=torch.uint8, value=exponent), bias=bias
    )
