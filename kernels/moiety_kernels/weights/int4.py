"""int4: one scale and an optional zero point per row and group of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moiety_kernels.weights.matrix import check
from moiety_kernels.weights.nibbles import pack_nibbles, unpack_nibbles

INT4_ZERO = 8  # the code of zero, where a matrix has no zero points
GROUP = 64  # columns per scale of matrices that this package quantises, by default
_INT4_LARGEST = 7
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # factors tried on a group's scale: clipping outliers may reduce the error


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """The matrix (codes - zero) * scale, with one scale and an optional zero point per row and group of D / G columns."""

    codes: torch.Tensor  # uint8 [O, D / 2]: even columns in the low half of a byte
    scale: torch.Tensor  # float16 or bfloat16 [O, G]
    zero: torch.Tensor | None = None  # uint8 [O, G], 0 to 15; None: 8 everywhere

    def __post_init__(self) -> None:
        rows, groups = self.scale.shape
        check("codes", self.codes, torch.uint8, (rows, self.codes.shape[1]))
        scales = torch.bfloat16 if self.scale.dtype == torch.bfloat16 else torch.float16
        check("scale", self.scale, scales, (rows, groups))
        if self.zero is not None:
            check("zero", self.zero, torch.uint8, (rows, groups))
        if not groups or self.shape[1] % groups:
            raise ValueError(f"int4: {self.shape[1]} columns cannot be {groups} groups: must be a multiple")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scale.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.scale) if self.zero is None else (self.codes, self.scale, self.zero)

    @classmethod
    def of(cls, matrix: torch.Tensor, group: int = GROUP, scales: torch.dtype = torch.float16) -> Int4Matrix:
        """Quantises `matrix` [O, D] without zero points; of several scales per group, keeps the one of least squared error.

        Raises ValueError where `group` is odd or does not divide D.
        """
        rows, columns = matrix.shape
        if group % 2 or columns % group:
            raise ValueError(f"int4: {columns} columns cannot be groups of {group}: must be an even divisor")
        values = matrix.float().view(rows, columns // group, group)
        largest = values.abs().amax(dim=2)  # [O, G]
        best, least = torch.zeros_like(values), torch.full_like(largest, torch.inf)
        kept = torch.zeros_like(largest, dtype=scales)
        for shrink in _SHRINKS:
            scale = (largest * (shrink / _INT4_LARGEST)).to(scales)
            divisor = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]
            steps = (values / divisor).round_().clamp_(-INT4_ZERO, _INT4_LARGEST)
            error = (steps * scale.float()[:, :, None] - values).square_().sum(dim=2)
            better = error < least
            best = torch.where(better[:, :, None], steps, best)
            kept, least = torch.where(better, scale, kept), torch.where(better, error, least)
        codes = best.add_(INT4_ZERO).to(torch.uint8).view(rows, columns)
        return cls(pack_nibbles(codes), kept)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        steps = unpack_nibbles(self.codes).float().view(rows, -1, self.group)
        steps -= INT4_ZERO if self.zero is None else self.zero.float()[:, :, None]
        return steps.mul_(self.scale.float()[:, :, None]).view(rows, columns).to(dtype)
