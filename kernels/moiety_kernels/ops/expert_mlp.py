"""Several experts' MLPs over rows sorted by expert: Triton on a GPU, one C++ call on a CPU that supports it, else torch.

Shape legend: R rows, D hidden size, I intermediate size, O = 2I when gated, else I.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from moiety_kernels.cpu.library import VNNI, load
from moiety_kernels.ops.by_format import Backend, for_each_format, run_in_triton, uses_triton
from moiety_kernels.ops.linear import PACKED_ROWS, linear, multiplies_in_pairs
from moiety_kernels.reference.expert_mlp import ACTIVATIONS, SWIGLU_CLAMPED, activate
from moiety_kernels.threads import thread_limit
from moiety_kernels.weights.expert_weights import ExpertWeights, dequantised
from moiety_kernels.weights.fp8 import FP8_BLOCK

__all__ = ["ExpertWeights", "grouped_expert_mlp"]

_ROWS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_SCALES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_POINTER, _SIZE, _FLAG, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURE = (
    *(_POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE),
    *(_FLAG, _FLAG, _FLAG, _FLAG, _REAL, _REAL, _FLAG),
)
LANE_COLUMNS = 8  # columns of int4 weights in one lane of a vector


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
    backend: Backend | None = None,
) -> torch.Tensor:
    """Runs each of `rows` [R, D] through its expert; returns outputs [R, D] in the rows' dtype.

    The first `counts[0]` rows belong to `weights[0]`, the next `counts[1]` to `weights[1]`, and so on. A count may be 0.
    Plain weights must have the rows' dtype. Experts may have different weight formats; each format is computed by itself.
    `deterministic`: the bits of an output row depend only on its input row and its expert. The C++ kernels guarantee this
    even without `deterministic`. `backend` is by default Triton if the rows are on a GPU and Triton is installed, else
    C++ or torch. Raises ValueError if counts, activation, or the shapes of rows and experts do not fit together.
    """
    if len(counts) != len(weights):
        raise ValueError(f"{len(counts)} counts for {len(weights)} experts")
    if sum(counts) != rows.shape[0] or min(counts, default=0) < 0:
        raise ValueError(f"counts add up to {sum(counts)}: must be {rows.shape[0]} rows, none negative")
    if activation not in ACTIVATIONS or (activation == SWIGLU_CLAMPED and (not gated or alpha is None)):
        activate(rows[:0], activation=activation, gated=gated, alpha=alpha)  # raises the ValueError
    if not rows.shape[0]:
        return torch.empty_like(rows)

    forms = {expert.form for expert in weights}
    hidden, depth, width = weights[0].form
    if len(forms) > 1 or hidden != rows.shape[1] or width != depth * (2 if gated else 1):
        shapes = "; ".join(f"D {d}, I {i}, O {o}" for d, i, o in sorted(forms))
        raise ValueError(f"expert shapes {shapes}: all must be equal, D {rows.shape[1]} and O {'2I' if gated else 'I'}")
    options: dict[str, Any] = {
        "activation": activation,
        "gated": gated,
        "interleaved": interleaved,
        "limit": limit,
        "alpha": alpha,
    }
    if backend == "triton" or (backend is None and uses_triton(rows)):
        compute = partial(run_in_triton, dtype=rows.dtype, deterministic=deterministic, options=options)
    else:
        compute = partial(_in_torch, deterministic=deterministic, options=options)
    return for_each_format(compute, rows, counts, weights, rows.dtype)


def _in_torch(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    deterministic: bool,
    options: dict[str, Any],
) -> torch.Tensor:
    """Computes experts of one weight format in C++ where that is available and not slower than torch, else in torch."""
    kernel = experts_kernel(rows.dtype, weights[0]) if rows.device.type == "cpu" else None
    many = rows.shape[0] > PACKED_ROWS * sum(map(bool, counts))  # mean rows per active expert
    if many and not deterministic and weights[0].kind == "bfloat16" and multiplies_in_pairs(rows.dtype):
        kernel = None
    if kernel is not None and rows.stride(1) == 1:
        out = rows.new_empty(rows.shape)
        pointers = [pointer for expert in weights for pointer in expert.pointers]
        *_, group_of_gate_up, _, group_of_down = weights[0].weight_format
        kernel(
            rows.data_ptr(),
            rows.stride(0),
            (ctypes.c_int64 * len(counts))(*counts),
            (ctypes.c_void_p * len(pointers))(*pointers),
            len(weights),
            out.data_ptr(),
            rows.shape[1],
            weights[0].form[1],
            group_of_gate_up,
            group_of_down,
            ACTIVATIONS.index(options["activation"]),
            options["gated"],
            options["interleaved"],
            options["limit"] is not None,
            options["limit"] or 0.0,
            options["alpha"] or 0.0,
            thread_limit(),
        )
        return out

    # One matrix is dequantised at a time: all of them together would need the memory that quantising saved.
    active = list(_active(counts, weights))
    projected = rows.new_empty(rows.shape[0], weights[0].form[2])  # [R, O]
    for span, expert in active:
        matrix = dequantised(expert.gate_up, rows.dtype)
        projected[span] = _product(rows[span], matrix, expert.gate_up_bias, deterministic)
    # One activation over all rows, not one per expert: with a few rows each, torch's dispatch costs more than the arithmetic.
    # Deterministic: row by row, because torch uses other instructions for the end of a tensor than for its bulk.
    parts = torch.split(projected, 1) if deterministic else (projected,)
    inner = torch.cat([activate(part, **options) for part in parts])  # [R, I]
    out = torch.empty_like(rows)
    for span, expert in active:
        matrix = dequantised(expert.down, rows.dtype)
        out[span] = _product(inner[span], matrix, expert.down_bias, deterministic)
    return out


def _product(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, deterministic: bool) -> torch.Tensor:
    """Returns x W^T + bias, rounded twice like the reference: after the product and after the bias."""
    product = linear(x, matrix, deterministic=True) if deterministic else x @ matrix.T
    return product if bias is None else product + bias


def _active(counts: Sequence[int], weights: Sequence[ExpertWeights]) -> Iterator[tuple[slice, ExpertWeights]]:
    """Yields the row span and the weights of each expert that has rows."""
    start = 0
    for count, expert in zip(counts, weights, strict=True):
        if count:
            yield slice(start, start + count), expert
        start += count


def experts_kernel(dtype: torch.dtype, expert: ExpertWeights) -> Callable[..., None] | None:
    """Returns the C++ function for rows of `dtype` and experts of `expert`'s weight format; None if there is none."""
    if dtype not in _ROWS or (library := load()) is None:
        return None
    name, kind = f"moiety_experts_{_ROWS[dtype]}", expert.kind
    if kind == str(dtype).removeprefix("torch."):
        return library.function(f"{name}_pairs" if multiplies_in_pairs(dtype) else name, *_SIGNATURE)
    _, scales, gate_up_group, _, down_group = expert.weight_format
    groups = (gate_up_group, down_group)
    if kind == "int4" and all(map(_ends_between_lanes, groups, expert.form[:2])):
        kind = f"int4_{_SCALES[scales]}"
    elif kind == "int8" and gate_up_group and library.cpu >= VNNI:
        return library.function(f"{name}_int8_rows", *_SIGNATURE, isa=VNNI)
    elif not (kind in ("int8", "mxfp4") or (kind == "fp8" and {*groups} <= {1, FP8_BLOCK})):
        return None
    return library.function(f"{name}_{kind}", *_SIGNATURE)


def _ends_between_lanes(group: int, columns: int) -> bool:
    """Whether int4 groups of `group` columns suit the C++ kernel: a power of two from 8 on, or the whole row.

    A lane of a vector holds 8 columns, which must share a scale.
    """
    return group == columns or (group >= LANE_COLUMNS and group & (group - 1) == 0)
