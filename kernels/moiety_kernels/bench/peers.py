"""Other implementations of an MoE block or its experts: torch's grouped product, a loop of cuBLAS calls, vLLM, scattermoe.

Each gets its input in the form of its own interface and in its fastest layout, prepared before timing.
Shape legend: T tokens, K experts per token, R rows of this device's experts, sorted by expert, E experts on this device,
D hidden size, I intermediate size.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from moiety_kernels.gpu.expert_mlp import ExpertOperands
from moiety_kernels.reference.activation import activate


@dataclass(frozen=True, slots=True)
class Work:
    """The input of one measurement: tokens, their chosen experts, and the weights and sorted rows of this device's experts."""

    x: torch.Tensor  # [T, D]
    index: torch.Tensor  # int64 [T, K]; E and above: an expert on another device
    weights: torch.Tensor  # float32 [T, K]
    experts: ExpertOperands
    rows: torch.Tensor  # [R, D], sorted by expert
    expert_of: torch.Tensor  # int64 [R]
    offsets: torch.Tensor  # int32 [E + 1]
    choices: int  # experts of the whole model


Function = Callable[[], torch.Tensor]


def _activated(work: Work, projected: torch.Tensor) -> torch.Tensor:
    """Adds the gate and up bias to `projected` [R, 2I] and applies the activation, both in eager torch: [R, I]."""
    if work.experts.gate_up.bias is not None:
        projected = projected + work.experts.gate_up.bias[work.expert_of]
    return activate(projected, work.experts.activation)


def grouped_mm(work: Work) -> Function | None:
    """Returns a function that computes the experts with two calls of `torch._grouped_mm`; None if torch lacks it.

    Biases and activation are separate torch operations.
    """
    product = getattr(torch, "_grouped_mm", None)
    if product is None:
        return None
    first, second = (matrices.codes.transpose(1, 2) for matrices in (work.experts.gate_up, work.experts.down))
    ends = work.offsets[1:].contiguous()

    def run() -> torch.Tensor:
        out: torch.Tensor = product(_activated(work, product(work.rows, first, offs=ends)), second, offs=ends)
        return out if work.experts.down.bias is None else out + work.experts.down.bias[work.expert_of]

    return run


def loop(work: Work) -> Function:
    """Returns a function that computes the experts with two cuBLAS calls for each expert that has rows.

    The activation is computed for all rows together. The host reads the row counts before timing.
    """
    bounds = work.offsets.tolist()
    spans = [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]
    gate_up, down = work.experts.gate_up, work.experts.down
    projected = work.rows.new_empty(len(work.rows), gate_up.shape[0])
    out = torch.empty_like(work.rows)

    def run() -> torch.Tensor:
        for e, span in spans:
            torch.mm(work.rows[span], gate_up.codes[e].T, out=projected[span])
        inner = _activated(work, projected)
        for e, span in spans:
            torch.mm(inner[span], down.codes[e].T, out=out[span])
        return out if down.bias is None else out + down.bias[work.expert_of]

    return run


def vllm(path: str) -> Callable[[Work], Function | None]:
    """Imports vLLM from the checkout or site-packages folder at `path`.

    The function returned prepares vLLM's `fused_experts` for a Work, or returns None if the experts have biases.
    """
    fused: Any = _imported(path, "vllm.model_executor.layers.fused_moe.fused_moe").fused_experts

    def prepare(work: Work) -> Function | None:
        if work.experts.gate_up.bias is not None:
            return None  # vLLM has other kernels for interleaved and biased experts
        first, second, ids = work.experts.gate_up.codes, work.experts.down.codes, work.index.int()
        if work.choices == len(first):
            return lambda: fused(work.x, first, second, work.weights, ids)
        expert_map = torch.arange(work.choices, dtype=torch.int32, device=ids.device)
        expert_map[len(first) :] = -1
        options = {"global_num_experts": work.choices, "expert_map": expert_map}
        return lambda: fused(work.x, first, second, work.weights, ids, **options)

    return prepare


def scattermoe(path: str) -> Callable[[Work], Function | None]:
    """Imports scattermoe from the checkout at `path`; returns a function that prepares its GLUMLP for a Work.

    GLUMLP expects up before gate, so the weights are copied into that order before timing.
    """
    glu_mlp: Any = _imported(path, "scattermoe.mlp").GLUMLP

    def prepare(work: Work) -> Function | None:
        gate_up, down = work.experts.gate_up, work.experts.down
        if gate_up.bias is not None or work.choices > gate_up.experts:
            return None  # GLUMLP supports neither interleaved experts nor experts on other devices
        with torch.device("meta"):
            module = glu_mlp(
                gate_up.shape[1], down.shape[1], gate_up.experts, work.index.shape[1], activation=torch.nn.SiLU()
            )
        gate, up = gate_up.codes.chunk(2, dim=1)
        module.experts.weight = torch.nn.Parameter(torch.cat((up, gate), dim=1), requires_grad=False)
        module.output_experts.weight = torch.nn.Parameter(down.codes, requires_grad=False)
        weights = work.weights.to(work.x.dtype)
        return lambda: module(work.x, weights, work.index)

    return prepare


def _imported(path: str, module: str) -> Any:
    """Imports `module` with `path` first on the module search path."""
    sys.path.insert(0, path)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(path)
