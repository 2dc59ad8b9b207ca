"""What else computes the same: torch's grouped product, a loop of cuBLAS calls, and public kernels given by their path.

Every peer gets the block's input as its own interface wants it, prepared beforehand, in the layout it is fastest with.
Shape legend: T tokens, K experts a token, R rows of this device's experts, sorted by them, E experts, D hidden size,
I intermediate size.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from moiety_kernels.gpu.expert_mlp import Experts
from moiety_kernels.reference.expert_mlp import activate


@dataclass(frozen=True, slots=True)
class Work:
    """One measurement's input."""

    x: torch.Tensor  # [T, D]
    index: torch.Tensor  # int64 [T, K]; E and above: an expert that is elsewhere
    weights: torch.Tensor  # float32 [T, K]
    experts: Experts  # plain
    rows: torch.Tensor  # [R, D], sorted by expert
    expert_of: torch.Tensor  # int64 [R]
    offsets: torch.Tensor  # int32 [E + 1]
    choices: int  # experts of the model, here or elsewhere


Function = Callable[[], torch.Tensor]


def _activated(work: Work, projected: torch.Tensor) -> torch.Tensor:
    """Bias and activation in torch, as eager code has them."""
    e = work.experts
    if e.gate_up.bias is not None:
        projected = projected + e.gate_up.bias[work.expert_of]
    return activate(
        projected, activation=e.activation, gated=e.gated, interleaved=e.interleaved, limit=e.limit, alpha=e.alpha
    )


def grouped_mm(work: Work) -> Function | None:
    """`torch._grouped_mm` over sorted rows, twice; activation and biases in torch."""
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
    """One cuBLAS call per expert that has rows and product, counts known to the host; activation over all rows at once."""
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
    """vLLM's fused_moe Triton kernel, of the checkout or site-packages folder at `path`."""
    fused: Any = _imported(path, "vllm.model_executor.layers.fused_moe.fused_moe").fused_experts

    def of(work: Work) -> Function | None:
        if work.experts.gate_up.bias is not None:
            return None  # interleaved and biased experts are other kernels of theirs
        first, second, ids = work.experts.gate_up.codes, work.experts.down.codes, work.index.int()
        if work.choices == len(first):
            return lambda: fused(work.x, first, second, work.weights, ids)
        here = torch.arange(work.choices, dtype=torch.int32, device=ids.device)
        here[len(first) :] = -1
        options = {"global_num_experts": work.choices, "expert_map": here}
        return lambda: fused(work.x, first, second, work.weights, ids, **options)

    return of


def scattermoe(path: str) -> Callable[[Work], Function | None]:
    """scattermoe's GLUMLP, of the checkout at `path`. It keeps up before gate: the weights are copied once, before timing."""
    made: Any = _imported(path, "scattermoe.mlp").GLUMLP

    def of(work: Work) -> Function | None:
        gate_up, down = work.experts.gate_up, work.experts.down
        if gate_up.bias is not None or work.choices > gate_up.experts:
            return None  # it knows neither interleaved experts nor ones that are elsewhere
        with torch.device("meta"):
            module = made(
                gate_up.shape[1], down.shape[1], gate_up.experts, work.index.shape[1], activation=torch.nn.SiLU()
            )
        gate, up = gate_up.codes.chunk(2, dim=1)
        module.experts.weight = torch.nn.Parameter(torch.cat((up, gate), dim=1), requires_grad=False)
        module.output_experts.weight = torch.nn.Parameter(down.codes, requires_grad=False)
        weights = work.weights.to(work.x.dtype)
        return lambda: module(work.x, weights, work.index)

    return of


def _imported(path: str, module: str) -> Any:
    """`module` with `path` before everything else."""
    sys.path.insert(0, path)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(path)
