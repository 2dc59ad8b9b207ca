"""mxfp4: 4-bit floats with one power of two per 32 columns, as in gpt-oss's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moiety_kernels.weights.matrix import check
from moiety_kernels.weights.nibbles import unpack_nibbles

MXFP4_GROUP = 32  # columns that share a scale, by the OCP Microscaling specification
# The value of each 4-bit code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127


@dataclass(frozen=True, slots=True)
class Mxfp4Matrix:
    """The matrix of e2m1 values times one power of two per row and group of 32 columns."""

    codes: torch.Tensor  # uint8 [O, D / 2]: even columns in the low half of a byte
    scale: torch.Tensor  # uint8 [O, D / 32]: exponents of two plus 127

    def __post_init__(self) -> None:
        rows, packed = self.codes.shape
        check("codes", self.codes, torch.uint8, (rows, packed))
        check("scale", self.scale, torch.uint8, (rows, 2 * packed // MXFP4_GROUP))
        if 2 * packed % MXFP4_GROUP:
            raise ValueError(f"mxfp4: {2 * packed} columns: must be a multiple of {MXFP4_GROUP}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scale

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        table = torch.tensor(E2M1, device=self.codes.device)
        values = table[unpack_nibbles(self.codes).int()].view(rows, -1, MXFP4_GROUP)
        exponents = self.scale.int() - E8M0_BIAS  # [O, D / 32]
        return torch.ldexp(values, exponents[:, :, None]).view(rows, columns).to(dtype)
