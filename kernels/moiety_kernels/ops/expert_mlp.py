"""Several experts' MLPs over rows sorted by expert: Triton on a GPU, one C++ call on a CPU that supports it, else torch.

Shape legend: R rows, D hidden size, I intermediate size, O = 2I when gated, else I.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from moiety_kernels.cpu.calls import ExpertsCall
from moiety_kernels.cpu.library import VNNI, load
from moiety_kernels.ops.by_format import Backend, for_each_format, run_in_triton, uses_triton
from moiety_kernels.ops.linear import PACKED_ROWS, linear, multiplies_in_pairs
from moiety_kernels.reference.activation import ACTIVATIONS, SWIGLU, Activation, activate
from moiety_kernels.threads import thread_limit
from moiety_kernels.weights.expert_table import addresses
from moiety_kernels.weights.expert_weights import ExpertWeights, dequantised
from moiety_kernels.weights.fp8 import FP8_BLOCK

__all__ = ["ExpertWeights", "grouped_expert_mlp"]

_ROWS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_SCALES = {torch.float16: "f16", torch.bfloat16: "bf16"}
LANE_COLUMNS = 8  # columns of int4 weights in one lane of a vector


@torch.no_grad()
def grouped_expert_mlp(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    activation: Activation = SWIGLU,
    *,
    dtype: torch.dtype | None = None,
    deterministic: bool = False,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Runs each of `rows` [R, D] through its expert; returns outputs [R, D] in `dtype`, by default that of the rows.

    The first `counts[0]` rows belong to `weights[0]`, the next `counts[1]` to `weights[1]`, and so on. A count may be 0.
    Plain weights must have the rows' dtype. Experts may have different weight formats; each format is computed by itself.
    `dtype` float32 returns the sums of the second product before they are rounded, so that the caller can add the outputs
    of an expert's slices. For rows of another dtype that is slower on a CPU, where the second product's inputs are
    converted to float32.

    `deterministic`: the bits of an output row depend only on its input row and its expert. The C++ kernels guarantee this
    even without `deterministic`. `backend` is by default Triton if the rows are on a GPU and Triton is installed, else
    C++ or torch. Raises ValueError if counts, dtype, activation, or the shapes of rows and experts do not fit together.
    """
    dtype = dtype or rows.dtype
    if dtype not in (rows.dtype, torch.float32):
        raise ValueError(f"dtype {dtype}: must be float32 or that of the rows, {rows.dtype}")
    if len(counts) != len(weights):
        raise ValueError(f"{len(counts)} counts for {len(weights)} experts")
    if sum(counts) != rows.shape[0] or min(counts, default=0) < 0:
        raise ValueError(f"counts add up to {sum(counts)}: must be {rows.shape[0]} rows, none negative")
    if not rows.shape[0]:
        return torch.empty_like(rows, dtype=dtype)

    forms = {expert.form for expert in weights}
    hidden, depth, width = weights[0].form
    if len(forms) > 1 or hidden != rows.shape[1] or width != depth * (2 if activation.gated else 1):
        shapes = "; ".join(f"D {d}, I {i}, O {o}" for d, i, o in sorted(forms))
        bound = f"all must be equal, D {rows.shape[1]} and O {'2I' if activation.gated else 'I'}"
        raise ValueError(f"expert shapes {shapes}: {bound}")
    triton = backend == "triton" or (backend is None and uses_triton(rows))
    run = run_in_triton if triton else _in_cpp_or_torch
    compute = partial(run, activation=activation, dtype=dtype, deterministic=deterministic)
    return for_each_format(compute, rows, counts, weights, dtype)


def _in_cpp_or_torch(
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    *,
    activation: Activation,
    dtype: torch.dtype,
    deterministic: bool,
) -> torch.Tensor:
    """Computes experts of one weight format in C++ where that is available and not slower than torch, else in torch."""
    many = rows.shape[0] > PACKED_ROWS * sum(map(bool, counts))  # mean rows per active expert
    packed = many and not deterministic and weights[0].kind == "bfloat16" and multiplies_in_pairs(rows.dtype)
    if rows.device.type == "cpu" and rows.stride(1) == 1 and rows.dtype == dtype and not packed:
        kernel = experts_kernel(dtype, weights[0])
        if kernel is not None:
            return _in_cpp(kernel, rows, counts, weights, activation)

    # One matrix is dequantised at a time: all of them together would need the memory that quantising saved.
    active = list(_active(counts, weights))
    projected = rows.new_empty(rows.shape[0], weights[0].form[2])  # [R, O]
    for span, expert in active:
        matrix = dequantised(expert.gate_up, rows.dtype)
        projected[span] = _product(rows[span], matrix, expert.gate_up_bias, deterministic)
    # One activation over all rows, not one per expert: with a few rows each, torch's dispatch costs more than the arithmetic.
    # Deterministic: row by row, because torch uses other instructions for the end of a tensor than for its bulk.
    parts = torch.split(projected, 1) if deterministic else (projected,)
    inner = torch.cat([activate(part, activation) for part in parts]).to(dtype)  # [R, I]
    out = torch.empty_like(rows, dtype=dtype)
    for span, expert in active:
        matrix = dequantised(expert.down, rows.dtype).to(dtype)
        out[span] = _product(inner[span], matrix, expert.down_bias, deterministic)
    return out


def _in_cpp(
    kernel: Callable[..., None],
    rows: torch.Tensor,
    counts: Sequence[int],
    weights: Sequence[ExpertWeights],
    activation: Activation,
) -> torch.Tensor:
    out = rows.new_empty(rows.shape)
    tensors = addresses(weights)
    *_, gate_up_group, _, down_group = weights[0].weight_format
    kernel(
        rows=rows.data_ptr(),
        counts=(ctypes.c_int64 * len(counts))(*counts),
        tensors=tensors.data_ptr(),
        out=out.data_ptr(),
        row_stride=rows.stride(0),
        experts=len(weights),
        hidden=rows.shape[1],
        intermediate=weights[0].form[1],
        gate_up_group=gate_up_group,
        down_group=down_group,
        activation=ACTIVATIONS.index(activation.name),
        gated=activation.gated,
        interleaved=activation.interleaved,
        threads=thread_limit(),
        limit=math.inf if activation.limit is None else activation.limit,
        alpha=activation.alpha or 0.0,
    )
    return out


def _product(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, deterministic: bool) -> torch.Tensor:
    """Returns x W^T + bias, rounded twice like the reference: after the product and after the bias."""
    product = linear(x, matrix, deterministic=deterministic)
    return product if bias is None else product + bias.to(x.dtype)


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
        return library.function(f"{name}_pairs" if multiplies_in_pairs(dtype) else name, ExpertsCall)
    _, scales, gate_up_group, _, down_group = expert.weight_format
    groups = (gate_up_group, down_group)
    if kind == "int4" and all(map(_ends_between_lanes, groups, expert.form[:2])):
        kind = f"int4_{_SCALES[scales]}"
    elif kind == "int8" and gate_up_group and library.cpu >= VNNI:
        return library.function(f"{name}_int8_rows", ExpertsCall, isa=VNNI)
    elif not (kind in ("int8", "mxfp4") or (kind == "fp8" and {*groups} <= {1, FP8_BLOCK})):
        return None
    return library.function(f"{name}_{kind}", ExpertsCall)


def _ends_between_lanes(group: int, columns: int) -> bool:
    """Whether int4 groups of `group` columns suit the C++ kernel: a power of two from 8 on, or the whole row.

    A lane of a vector holds 8 columns, which must share a scale.
    """
    return group == columns or (group >= LANE_COLUMNS and group & (group - 1) == 0)
