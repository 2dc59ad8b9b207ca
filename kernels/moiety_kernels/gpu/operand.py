"""The weight matrices of several experts in the form that kernels take: base pointers, offsets, strides, scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moiety_kernels.weights.expert_table import addresses
from moiety_kernels.weights.expert_weights import FORMATS, ExpertWeights
from moiety_kernels.weights.fp8 import FP8_BLOCK, Fp8Matrix
from moiety_kernels.weights.matrix import Matrix

KINDS = ("plain", "fp8", "int8", "int4", "mxfp4")  # in the order of the constants in product.py
WHOLE = 1 << 30  # a group that spans all columns: one scale per row


@dataclass(frozen=True, slots=True)
class Operand:
    """The matrices [O, K] of E experts, each anywhere in memory: one expert's tensors, and every expert's offsets from them.

    `codes`, `scale`, `zero` and `bias` start at one expert's values. `offsets[0, e]` is how many elements after `codes`
    the codes of expert e start; rows 1 to 3 of `offsets` are the same for `scale`, `zero` and `bias`. `strides` are the
    steps along O and K within a matrix, in elements of `codes`. One scale serves `group_rows` rows and `group` columns.
    """

    codes: torch.Tensor
    offsets: torch.Tensor  # int64 [4, E]
    shape: tuple[int, int]  # O, K
    strides: tuple[int, int]
    kind: int = 0  # index into KINDS
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale_stride: int = 0  # from one row of scales to the next
    group: int = WHOLE
    group_rows: int = 1
    aligned: bool = False  # every matrix starts at a multiple of 16 elements from `codes`

    @property
    def experts(self) -> int:
        """The number of experts, E."""
        return self.offsets.shape[1]

    @property
    def matrix_nbytes(self) -> int:
        """Bytes of one expert's codes and scales, which a decode step reads."""
        rows, columns = self.shape
        bits = 4 if KINDS[self.kind] in ("int4", "mxfp4") else 8 * self.codes.element_size()
        scales = -(-rows // self.group_rows) * -(-columns // self.group) if self.scale is not None else 0
        return rows * columns * bits // 8 + (scales * self.scale.element_size() if self.scale is not None else 0)


def operand_of_stack(
    codes: torch.Tensor,
    *,
    transposed: bool = False,
    kind: str = "plain",
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> Operand:
    """Makes an operand from one tensor that holds all experts, as in a checkpoint: [E, O, K], or [E, K, O] if `transposed`.

    `int4` and `mxfp4` pack two values per byte ([E, O, K / 2], even columns in the low half). `scale` is [E, O] for `int8`,
    [E, O, groups] for `int4` and `mxfp4`, [E, ceil(O / 128), ceil(K / 128)] for `fp8`. `bias` is [E, O]. Copies no
    weights. Raises ValueError for an unknown `kind` and for transposed 4-bit weights.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    if kind not in ("plain", "fp8", "int8") and transposed:
        raise ValueError(f"kind {kind!r} with layout [E, K, O]: must be [E, O, K], packed along K")
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


def _operand(matrix: Matrix, bias: torch.Tensor | None, offsets: torch.Tensor, aligned: bool) -> Operand:
    """Makes an operand from one expert's `matrix` and `bias` and every expert's `offsets` [4, E] (see Operand)."""
    rows, columns = matrix.shape
    if isinstance(matrix, torch.Tensor):
        return Operand(matrix, offsets, (rows, columns), (matrix.stride(0), 1), bias=bias, aligned=aligned)
    codes, scale, *zero = matrix.tensors
    kind = FORMATS[type(matrix)]
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


def operands_of(counts: Sequence[int], weights: Sequence[ExpertWeights]) -> tuple[torch.Tensor, Operand, Operand]:
    """Makes the operands of a batch from separately stored experts: returns row offsets int64 [E + 1], gate_up and down.

    Expert e has `counts[e]` rows and `weights[e]`; all experts must have one `weight_format`. All offsets are sent to
    the device in one small copy, for which the host does not wait. The weights stay in place, so changing the placement
    between two batches costs nothing. The caller must keep the weights alive.
    """
    first = weights[0]
    pointers = addresses(weights).T  # [8, E]
    sizes = torch.tensor([1 if part is None else part.element_size() for part in first.parts])
    offsets = (pointers - pointers[:, :1]) // sizes[:, None]
    starts = torch.tensor([0, *counts]).cumsum(0)
    packed = torch.cat((offsets[[0, 1, 2, 6, 3, 4, 5, 7]].flatten(), starts))
    packed = packed.to(first.tensors[0].device, non_blocking=True)  # pageable and small: the driver stages it
    gate_up_offsets, down_offsets, row_offsets = packed.split((4 * len(weights), 4 * len(weights), len(starts)))
    return (
        row_offsets,
        _operand(first.gate_up, first.gate_up_bias, gate_up_offsets.view(4, -1), _aligned(offsets)),
        _operand(first.down, first.down_bias, down_offsets.view(4, -1), _aligned(offsets[3:])),
    )


def _aligned(offsets: torch.Tensor) -> bool:
    """Whether every expert's codes start at a multiple of 16 elements from those of the operand's first expert."""
    return not bool((offsets[0] % 16).any())


def _groups(kind: str, scale: torch.Tensor | None, columns: int) -> tuple[int, int]:
    """Returns how many columns and how many rows share a scale, from `kind` and the scales' shape [E, O, groups]."""
    if kind == "fp8":
        return FP8_BLOCK, FP8_BLOCK
    if kind in ("int4", "mxfp4") and scale is not None:
        return columns // scale.shape[2], 1
    return WHOLE, 1
