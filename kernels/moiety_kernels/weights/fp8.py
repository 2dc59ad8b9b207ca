"""fp8 (e4m3) with one scale per block, as in DeepSeek's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moiety_kernels.weights.matrix import check

FP8_BLOCK = 128  # rows and columns that share a scale in DeepSeek's checkpoints


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """The matrix codes * scale, with one scale per block of `block_rows` rows and 128 columns; edge blocks may be smaller."""

    codes: torch.Tensor  # float8_e4m3fn [O, D]
    scale: torch.Tensor  # float32 [ceil(O / block_rows), ceil(D / 128)]
    block_rows: int = FP8_BLOCK

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        check("codes", self.codes, torch.float8_e4m3fn, (rows, columns))
        check("scale", self.scale, torch.float32, (-(-rows // self.block_rows), -(-columns // FP8_BLOCK)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scale

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Fp8Matrix:
        """Quantises `matrix` [O, D] in blocks of 128 x 128; each block is scaled to e4m3's largest magnitude, 448."""
        rows, columns = matrix.shape
        padded = torch.nn.functional.pad(matrix.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
        blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        values = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None, :, None]
        codes = values.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn)
        return cls(codes.contiguous(), scale)

    def by_row(self) -> Fp8Matrix:
        """Returns the same values with `block_rows` 1; in this form, matrices of one width can be joined by rows."""
        scale = self.scale.repeat_interleave(self.block_rows, dim=0)[: self.shape[0]].contiguous()
        return Fp8Matrix(self.codes, scale, 1)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        scale = self.scale.repeat_interleave(self.block_rows, dim=0)[:rows]
        return self.codes.float().mul_(scale.repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]).to(dtype)
