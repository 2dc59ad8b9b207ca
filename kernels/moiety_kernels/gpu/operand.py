"""One weight matrix of each of several experts, as the kernels take it: base pointers, offsets, strides, scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moiety_kernels.weights.expert_weights import ExpertWeights
from moiety_kernels.weights.fp8 import FP8_BLOCK, Fp8Matrix
from moiety_kernels.weights.int4 import Int4Matrix
from moiety_kernels.weights.int8 import Int8Matrix
from moiety_kernels.weights.matrix import Matrix
from moiety_kernels.weights.mxfp4 import Mxfp4Matrix

KINDS = ("plain", "fp8", "int8", "int4", "mxfp4")  # numbered as in product.py
WHOLE = 1 << 30  # a group that spans every column: one scale a row


@dataclass(frozen=True, slots=True)
class Operand:
    """The matrices [O, K] of E experts, wherever they lie: expert e's starts `offsets[0, e]` elements past `codes`.

    `codes`, `scale`, `zero` and `bias` are any one expert's; `offsets` int64 [4, E] holds every expert's distance from
    them, in elements, in this order. `strides` are those of O and K within a matrix (of bytes where two values share one).
    One scale serves `group_rows` rows and `group` columns.
    """

    codes: torch.Tensor
    offsets: torch.Tensor  # int64 [4, E]
    shape: tuple[int, int]  # O, K
    strides: tuple[int, int]
    kind: int = 0  # index into KINDS
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale_stride: int = 0  # of a row of scales
    group: int = WHOLE
    group_rows: int = 1
    aligned: bool = False  # every matrix starts a multiple of 16 elements from `codes`

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets.shape[1]

    @property
    def matrix_nbytes(self) -> int:
        """Bytes of one expert's codes and scales: what a decode step reads of it."""
        rows, columns = self.shape
        bits = 4 if KINDS[self.kind] in ("int4", "mxfp4") else 8 * self.codes.element_size()
        scales = -(-rows // self.group_rows) * -(-columns // self.group) if self.scale is not None else 0
        return rows * columns * bits // 8 + (scales * self.scale.element_size() if self.scale is not None else 0)


def stacked(
    codes: torch.Tensor,
    *,
    transposed: bool = False,
    kind: str = "plain",
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Operand:
    """Of one tensor of all experts, in the checkpoint's layout: [E, O, K], or [E, K, O] when `transposed`.

    `int4` and `mxfp4` hold two values a byte ([E, O, K / 2], the even column in the low half). `scale` [E, O] for `int8`,
    [E, O, groups] for `int4` and `mxfp4`, [E, ceil(O / 128), ceil(K / 128)] for `fp8`. `bias` [E, O]. Copies nothing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    if kind not in ("plain", "fp8", "int8") and transposed:
        raise ValueError(f"kind {kind!r} of layout [E, K, O]: only [E, O, K] is packed along K")
    experts = codes.shape[0]
    rows, columns = codes.shape[:0:-1] if transposed else codes.shape[1:]
    if kind in ("int4", "mxfp4"):
        columns *= 2
    step = torch.arange(experts, dtype=torch.int64)
    parts = (codes, scale, zero, bias)
    host = torch.stack([step * (part.stride(0) if part is not None else 0) for part in parts])
    strides = (codes.stride(2), codes.stride(1)) if transposed else (codes.stride(1), codes.stride(2))
    group, group_rows = _groups(kind, scale, columns)
    scale_stride = 0 if scale is None else scale.stride(1)
    return Operand(
        codes,
        host.to(codes.device),
        (rows, columns),
        strides,
        KINDS.index(kind),
        scale,
        zero,
        bias,
        scale_stride,
        group,
        group_rows,
        _aligned(host),
    )


def _one(matrix: Matrix, bias: torch.Tensor | None, offsets: torch.Tensor, aligned: bool) -> Operand:
    """What every expert's matrix looks like, told by the first one's; `offsets` on the device."""
    rows, columns = matrix.shape
    if isinstance(matrix, torch.Tensor):
        return Operand(matrix, offsets, (rows, columns), (matrix.stride(0), 1), bias=bias, aligned=aligned)
    codes, scale, *zero = matrix.tensors
    kind = {Int8Matrix: "int8", Int4Matrix: "int4", Fp8Matrix: "fp8", Mxfp4Matrix: "mxfp4"}[type(matrix)]
    group, group_rows = WHOLE, 1
    if isinstance(matrix, Fp8Matrix):
        group, group_rows = FP8_BLOCK, matrix.block_rows
    elif kind != "int8":
        group = columns // scale.shape[1]
    return Operand(
        codes,
        offsets,
        (rows, columns),
        (codes.stride(0), 1),
        KINDS.index(kind),
        scale,
        zero[0] if zero else None,
        bias,
        scale.stride(0),
        group,
        group_rows,
        aligned,
    )


def gathered(counts: Sequence[int], weights: Sequence[ExpertWeights]) -> tuple[torch.Tensor, Operand, Operand]:
    """Of experts held one by one (with equal `held`): offsets of their rows int64 [E + 1], gate_up, down.

    All that the device must be told of a batch goes over in one small copy, which the host does not wait for; the weights
    stay where they are, so a placement can change between two batches at no cost. The caller keeps them alive.
    """
    first = weights[0]
    pointers = torch.tensor([[pointer or 0 for pointer in expert.pointers] for expert in weights]).T  # [8, E]
    tensors = (*_three(first.gate_up), *_three(first.down), first.gate_up_bias, first.down_bias)
    sizes = torch.tensor([1 if tensor is None else tensor.element_size() for tensor in tensors])
    offsets = (pointers - pointers[:, :1]) // sizes[:, None]
    starts = torch.tensor([0, *counts]).cumsum(0)
    told = torch.cat((offsets[[0, 1, 2, 6, 3, 4, 5, 7]].flatten(), starts))
    told = told.to(tensors[0].device, non_blocking=True)  # pageable and small: the driver stages it
    of_gate_up, of_down, on_device = told.split((4 * len(weights), 4 * len(weights), len(starts)))
    return (
        on_device,
        _one(first.gate_up, first.gate_up_bias, of_gate_up.view(4, -1), _aligned(offsets)),
        _one(first.down, first.down_bias, of_down.view(4, -1), _aligned(offsets[3:])),
    )


def _three(matrix: Matrix) -> tuple[Any, ...]:
    """Codes, scale and zero, None where there is none."""
    tensors = (matrix,) if isinstance(matrix, torch.Tensor) else matrix.tensors
    return (*tensors, None, None)[:3]


def _aligned(offsets: torch.Tensor) -> bool:
    return not bool((offsets[0] % 16).any())


def _groups(kind: str, scale: torch.Tensor | None, columns: int) -> tuple[int, int]:
    """Columns and rows that share a scale, told by `kind` and the scales' shape [E, O, groups]."""
    if kind == "fp8":
        return FP8_BLOCK, FP8_BLOCK
    if kind in ("int4", "mxfp4") and scale is not None:
        return columns // scale.shape[2], 1
    return WHOLE, 1
