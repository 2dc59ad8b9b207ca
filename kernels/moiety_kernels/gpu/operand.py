"""One weight matrix of each of several experts, as the kernels take it: base pointers, offsets, strides, scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    owners: tuple[torch.Tensor, ...] = ()  # of the memory that only `offsets` tell of
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
        aligned=_aligned(host),
    )


def scattered(
    codes: Sequence[torch.Tensor],
    *,
    kind: str = "plain",
    scale: Sequence[torch.Tensor] | None = None,
    zero: Sequence[torch.Tensor] | None = None,
    bias: Sequence[torch.Tensor] | None = None,
    group_rows: int | None = None,
) -> Operand:
    """Of one tensor per expert, each contiguous [O, K] (packed: [O, K / 2]), on one device, wherever it was allocated."""
    first = codes[0]
    rows, columns = first.shape
    if kind in ("int4", "mxfp4"):
        columns *= 2
    host = torch.zeros(4, len(codes), dtype=torch.int64)
    for line, part in enumerate((codes, scale, zero, bias)):
        if part is not None:
            start, size = part[0].data_ptr(), part[0].element_size()
            host[line] = torch.tensor([(tensor.data_ptr() - start) // size for tensor in part])
    group, blocks = _groups(kind, None if scale is None else scale[0][None], columns)
    return Operand(
        first,
        # Pageable and small: the driver stages it, and the host goes on.
        host.to(first.device, non_blocking=True),
        (rows, columns),
        (first.stride(0), first.stride(1)),
        KINDS.index(kind),
        None if scale is None else scale[0],
        None if zero is None else zero[0],
        None if bias is None else bias[0],
        0 if scale is None else scale[0].stride(0),
        group,
        group_rows or blocks,
        tuple(tensor for part in (codes, scale, zero, bias) for tensor in part or ()),
        _aligned(host),
    )


def _aligned(offsets: torch.Tensor) -> bool:
    return not bool((offsets[0] % 16).any())


def _groups(kind: str, scale: torch.Tensor | None, columns: int) -> tuple[int, int]:
    """Columns and rows that share a scale, told by `kind` and the scales' shape [E, O, groups]."""
    if kind == "fp8":
        return 128, 128
    if kind in ("int4", "mxfp4") and scale is not None:
        return columns // scale.shape[2], 1
    return WHOLE, 1
