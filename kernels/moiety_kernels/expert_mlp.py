"""Several experts' MLPs over rows sorted by expert: in one call of C++ where this CPU has it, else in torch.

Shape legend: R rows, D hidden size, I intermediate size, O = 2I when gated, else I.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from moiety_kernels.cpu.library import load
from moiety_kernels.reference import ACTIVATIONS, SWIGLU_CLAMPED, activate
from moiety_kernels.weights import ExpertWeights

__all__ = ["ExpertWeights", "grouped_expert_mlp"]


@torch.no_grad()
def grouped_expert_mlp(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
) -> torch.Tensor:
    """Row i through the expert it is sorted under: [R, D] -> [R, D], in the rows' dtype, which must be the weights'.

    The first `counts[0]` rows belong to `weights[0]`, the next `counts[1]` to `weights[1]`, and so on. A count may be
    0: those weights are not touched. Raises ValueError where the counts do not add up to R.
    """
    if len(counts) != len(weights):
        raise ValueError(f"{len(counts)} counts for {len(weights)} experts")
    if sum(counts) != rows.shape[0] or min(counts, default=0) < 0:
        raise ValueError(f"counts add up to {sum(counts)}: must be {rows.shape[0]} rows, none negative")
    if not rows.shape[0]:
        return torch.empty_like(rows)
    if not transposed and rows.device.type == "cpu" and (kernel := _kernel(rows.dtype)) is not None:
        return _in_one_call(
            kernel, rows, counts, weights, activation=activation, gated=gated, interleaved=interleaved, limit=limit, alpha=alpha
        )

    width = weights[0].gate_up.shape[1 if transposed else 0]
    projected = rows.new_empty(rows.shape[0], width)  # [R, O]
    for span, expert in _activated(counts, weights):
        matrix = expert.gate_up if transposed else expert.gate_up.T
        torch.mm(rows[span], matrix, out=projected[span])
        if expert.gate_up_bias is not None:
            projected[span] += expert.gate_up_bias

    # One call over all rows, not one per expert: at a few rows each, dispatch would cost more than the arithmetic.
    inner = activate(
        projected, activation=activation, gated=gated, interleaved=interleaved, limit=limit, alpha=alpha
    )  # [R, I]

    out = torch.empty_like(rows)
    for span, expert in _activated(counts, weights):
        torch.mm(inner[span], expert.down if transposed else expert.down.T, out=out[span])
        if expert.down_bias is not None:
            out[span] += expert.down_bias
    return out


@functools.cache
def _kernel(dtype: torch.dtype) -> Callable[..., None] | None:
    """The C++ function for this dtype, where there is one."""
    names = {torch.float32: "moiety_experts_f32", torch.bfloat16: "moiety_experts_bf16"}
    if dtype not in names or (library := load()) is None:
        return None
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    return library.function(
        names[dtype],
        *(pointer, size, pointer, pointer, size, pointer, size, size),
        *(flag, flag, flag, flag, real, real, flag),
    )


def _in_one_call(
    kernel: Callable[..., None],
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
    alpha: float | None,
) -> torch.Tensor:
    if activation not in ACTIVATIONS or (activation == SWIGLU_CLAMPED and (not gated or alpha is None)):
        activate(rows[:0], activation=activation, gated=gated, alpha=alpha)  # raises, and says why
    out = torch.empty_like(rows)
    pointers = [
        None if tensor is None else tensor.data_ptr()
        for expert in weights
        for tensor in (expert.gate_up, expert.down, expert.gate_up_bias, expert.down_bias)
    ]
    kernel(
        rows.data_ptr(),
        rows.stride(0),
        (ctypes.c_int64 * len(counts))(*counts),
        (ctypes.c_void_p * len(pointers))(*pointers),
        len(weights),
        out.data_ptr(),
        rows.shape[1],
        weights[0].down.shape[1],
        ACTIVATIONS.index(activation),
        gated,
        interleaved,
        limit is not None,
        limit or 0.0,
        alpha or 0.0,
        torch.get_num_threads(),
    )
    return out


def _activated(counts: Sequence[int], weights: Sequence[ExpertWeights]) -> Iterator[tuple[slice, ExpertWeights]]:
    """The row span and weights of each expert that has rows."""
    start = 0
    for count, expert in zip(counts, weights, strict=True):
        if count:
            yield slice(start, start + count), expert
        start += count
