"""int8 with one scale per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moiety_kernels.weights.matrix import check

INT8_ZERO = 128  # added to int8 values, which are stored as uint8: x86 multiplies unsigned by signed bytes
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """The matrix (codes - 128) * scale, with one scale per row.

    `rounds_rows`: kernels may also round each row of x, the other factor of a product, to int8 with a scale of its own.
    This is up to four times as fast in prefill and adds another rounding error.
    """

    codes: torch.Tensor  # uint8 [O, D]
    scale: torch.Tensor  # float32 [O]
    rounds_rows: bool = False

    def __post_init__(self) -> None:
        check("codes", self.codes, torch.uint8, self.codes.shape)
        check("scale", self.scale, torch.float32, self.codes.shape[:1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scale

    @classmethod
    def of(cls, matrix: torch.Tensor, *, rounds_rows: bool = False) -> Int8Matrix:
        """Quantises `matrix` [O, D], rounding to nearest. A row of zeros gets the scale 0."""
        scale = matrix.amax(dim=1).maximum(-matrix.amin(dim=1)).float() / 127
        divisor = scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
        # A few rows at a time: float32 copies of whole matrices would leave holes that stay in a replica's memory.
        for start in range(0, len(matrix), _ROWS_AT_ONCE):
            span = slice(start, start + _ROWS_AT_ONCE)
            codes[span] = (matrix[span].float() / divisor[span]).round_().add_(INT8_ZERO)
        return cls(codes, scale, rounds_rows)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes.float() - INT8_ZERO).mul_(self.scale[:, None]).to(dtype)
