"""Several experts' MLPs over rows sorted by expert: in one call of C++ where this CPU has it, else in torch.

Shape legend: R rows, D hidden size, I intermediate size, O = 2I when gated, else I.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence

import torch

from moiety_kernels.cpu.library import VNNI, load
from moiety_kernels.linear import linear
from moiety_kernels.reference import ACTIVATIONS, SWIGLU_CLAMPED, activate
from moiety_kernels.weights import ExpertWeights

__all__ = ["ExpertWeights", "grouped_expert_mlp"]

_NAMES = {
    (torch.float32, False): "moiety_experts_f32",
    (torch.bfloat16, False): "moiety_experts_bf16",
    (torch.float32, True): "moiety_experts_f32_int8",
    (torch.bfloat16, True): "moiety_experts_bf16_int8",
}
_POINTER, _SIZE, _FLAG, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURE = (
    *(_POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE),
    *(_FLAG, _FLAG, _FLAG, _FLAG, _REAL, _REAL, _FLAG),
)


@torch.no_grad()
def grouped_expert_mlp(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Row i through the expert it is sorted under: [R, D] -> [R, D], in the rows' dtype, which must be the weights'.

    The first `counts[0]` rows belong to `weights[0]`, the next `counts[1]` to `weights[1]`, and so on. A count may be
    0: those weights are not touched. Either all weights are int8 or none. `deterministic`: an output row's bits depend on
    its input row and its expert alone, which the C++ kernels always grant. Raises ValueError where the counts do not add
    up to R, or the experts do not fit the rows and one another.
    """
    if len(counts) != len(weights):
        raise ValueError(f"{len(counts)} counts for {len(weights)} experts")
    if sum(counts) != rows.shape[0] or min(counts, default=0) < 0:
        raise ValueError(f"counts add up to {sum(counts)}: must be {rows.shape[0]} rows, none negative")
    if activation not in ACTIVATIONS or (activation == SWIGLU_CLAMPED and (not gated or alpha is None)):
        activate(rows[:0], activation=activation, gated=gated, alpha=alpha)  # raises, and says why
    if not rows.shape[0]:
        return torch.empty_like(rows)

    forms = {expert.form for expert in weights}
    hidden, depth, width, _ = weights[0].form
    if len(forms) > 1 or hidden != rows.shape[1] or width != depth * (2 if gated else 1):
        told = ", ".join(f"D {d}, I {i}, O {o}, {dtype}" for d, i, o, dtype in sorted(forms, key=str))
        raise ValueError(f"experts of {told}: must be of one form, D {rows.shape[1]} and O {'2I' if gated else 'I'}")
    quantised = weights[0].gate_up_scale is not None
    kernel = experts_kernel(rows.dtype, quantised) if rows.device.type == "cpu" else None
    if kernel is not None and rows.stride(1) == 1:
        out = rows.new_empty(rows.shape)
        tensors = [None if tensor is None else tensor.data_ptr() for expert in weights for tensor in expert.tensors]
        kernel(
            rows.data_ptr(),
            rows.stride(0),
            (ctypes.c_int64 * len(counts))(*counts),
            (ctypes.c_void_p * len(tensors))(*tensors),
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

    active = [(span, expert.dequantised(rows.dtype)) for span, expert in _active(counts, weights)]
    projected = rows.new_empty(rows.shape[0], weights[0].gate_up.shape[0])  # [R, O]
    for span, expert in active:
        projected[span] = _product(rows[span], expert.gate_up, expert.gate_up_bias, deterministic)
    # One activation over all rows, not one per expert: at a few rows each, dispatch would cost more than the arithmetic.
    # Deterministic: row by row, since torch computes the end of a tensor with other instructions than its bulk.
    parts = torch.split(projected, 1) if deterministic else (projected,)
    inner = torch.cat(
        [
            activate(part, activation=activation, gated=gated, interleaved=interleaved, limit=limit, alpha=alpha)
            for part in parts
        ]
    )  # [R, I]
    out = torch.empty_like(rows)
    for span, expert in active:
        out[span] = _product(inner[span], expert.down, expert.down_bias, deterministic)
    return out


def _product(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, deterministic: bool) -> torch.Tensor:
    """As the reference rounds it: first the product, then its sum with the bias."""
    product = linear(x, matrix, deterministic=True) if deterministic else x @ matrix.T
    return product if bias is None else product + bias


def _active(counts: Sequence[int], weights: Sequence[ExpertWeights]) -> Iterator[tuple[slice, ExpertWeights]]:
    """The row span and weights of each expert that has rows."""
    start = 0
    for count, expert in zip(counts, weights, strict=True):
        if count:
            yield slice(start, start + count), expert
        start += count


def experts_kernel(dtype: torch.dtype, quantised: bool) -> Callable[..., None] | None:
    """The C++ function for rows of this dtype, where there is one."""
    if (dtype, quantised) not in _NAMES or (library := load()) is None:
        return None
    return library.function(_NAMES[dtype, quantised], *_SIGNATURE, isa=VNNI if quantised else frozenset())
