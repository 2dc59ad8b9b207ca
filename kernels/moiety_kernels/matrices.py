"""Quantised weight matrices as they are held: in the layout they are published in, one row per output feature.

Shape legend: O output features (rows), D input features (columns), G groups of columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

INT8_ZERO = 128  # added to int8 values, which are kept as uint8: x86 multiplies unsigned by signed bytes
INT4_ZERO = 8  # the same for int4, where there is no zero point of a group's own
FP8_BLOCK = 128  # rows and columns that share a scale in DeepSeek's checkpoints
MXFP4_GROUP = 32  # columns that share a scale, by the OCP Microscaling specification
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
GROUP = 64  # columns per scale where we quantise to int4 ourselves
_INT4_LARGEST = 7
_ROWS_AT_ONCE = 64
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's scale, tried in turn: clipping outliers may cost less


class QuantisedMatrix(Protocol):
    """A weight matrix [O, D] that is smaller than its values."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, D) of the values."""
        ...

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What is held, in the order of the fields."""
        ...

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The values, [O, D]: computed in float32, rounded once."""
        ...


Matrix = torch.Tensor | QuantisedMatrix


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """(codes - 128) * scale: symmetric, one scale per row.

    `rounds_rows`: kernels may round the rows that meet it to int8, too, each by its own largest magnitude: up to four times
    as fast in prefill, with an error of its own.
    """

    codes: torch.Tensor  # uint8 [O, D]
    scale: torch.Tensor  # float32 [O]
    rounds_rows: bool = False

    def __post_init__(self) -> None:
        _check("codes", self.codes, torch.uint8, self.codes.shape)
        _check("scale", self.scale, torch.float32, self.codes.shape[:1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scale

    @classmethod
    def of(cls, matrix: torch.Tensor, *, rounds_rows: bool = False) -> Int8Matrix:
        """`matrix` [O, D], rounded to the nearest. A row of zeros has the scale 0."""
        scale = matrix.amax(dim=1).maximum(-matrix.amin(dim=1)).float() / 127
        divisor = scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
        # Some rows at a time: a float32 copy of each matrix, made and freed, leaves holes that a replica's memory keeps.
        for start in range(0, len(matrix), _ROWS_AT_ONCE):
            span = slice(start, start + _ROWS_AT_ONCE)
            codes[span] = (matrix[span].float() / divisor[span]).round_().add_(INT8_ZERO)
        return cls(codes, scale, rounds_rows)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes.float() - INT8_ZERO).mul_(self.scale[:, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """(codes - zero) * scale with one scale, and maybe one zero point, per row and group of D / G columns."""

    codes: torch.Tensor  # uint8 [O, D / 2]: the even column of two in the low half of a byte
    scale: torch.Tensor  # float16 or bfloat16 [O, G]
    zero: torch.Tensor | None = None  # uint8 [O, G], 0 to 15; None: 8 throughout

    def __post_init__(self) -> None:
        rows, groups = self.scale.shape
        _check("codes", self.codes, torch.uint8, (rows, self.codes.shape[1]))
        scales = torch.bfloat16 if self.scale.dtype == torch.bfloat16 else torch.float16
        _check("scale", self.scale, scales, (rows, groups))
        if self.zero is not None:
            _check("zero", self.zero, torch.uint8, (rows, groups))
        if not groups or self.shape[1] % groups:
            raise ValueError(f"int4: {self.shape[1]} columns cannot be {groups} groups of one size")

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
        """`matrix` [O, D], symmetric; of some scales a group gets the one with the least squared error.

        Raises ValueError where D is no multiple of `group`, which must be even.
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


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """codes * scale with one scale per block of `block_rows` rows and 128 columns; edge blocks may be smaller."""

    codes: torch.Tensor  # float8_e4m3fn [O, D]
    scale: torch.Tensor  # float32 [ceil(O / block_rows), ceil(D / 128)]
    block_rows: int = FP8_BLOCK

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        _check("codes", self.codes, torch.float8_e4m3fn, (rows, columns))
        _check("scale", self.scale, torch.float32, (-(-rows // self.block_rows), -(-columns // FP8_BLOCK)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scale

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Fp8Matrix:
        """`matrix` [O, D] in blocks of 128 x 128, each scaled so that its largest magnitude is e4m3's, 448."""
        rows, columns = matrix.shape
        padded = torch.nn.functional.pad(matrix.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
        blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        values = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None, :, None]
        codes = values.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn)
        return cls(codes.contiguous(), scale)

    def by_row(self) -> Fp8Matrix:
        """The same values with a row of scales for each row, so that it can be joined to any other."""
        scale = self.scale.repeat_interleave(self.block_rows, dim=0)[: self.shape[0]].contiguous()
        return Fp8Matrix(self.codes, scale, 1)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = self.shape
        scale = self.scale.repeat_interleave(self.block_rows, dim=0)[:rows]
        return self.codes.float().mul_(scale.repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]).to(dtype)


@dataclass(frozen=True, slots=True)
class Mxfp4Matrix:
    """e2m1 values times a power of two per row and 32 columns, as gpt-oss publishes its experts."""

    codes: torch.Tensor  # uint8 [O, D / 2]: the even column of two in the low half of a byte
    scale: torch.Tensor  # uint8 [O, D / 32]: exponents of two, 127 added

    def __post_init__(self) -> None:
        rows, packed = self.codes.shape
        _check("codes", self.codes, torch.uint8, (rows, packed))
        _check("scale", self.scale, torch.uint8, (rows, 2 * packed // MXFP4_GROUP))
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


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [O, D] of values below 16 -> uint8 [O, D / 2], the even column of two in the low half."""
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((codes & 15, codes >> 4), dim=2).view(codes.shape[0], -1)


def moved(matrix: Matrix, device: torch.device | str) -> Matrix:
    """The same matrix on `device`."""
    if isinstance(matrix, torch.Tensor):
        return matrix.to(device)
    if isinstance(matrix, Fp8Matrix):
        return Fp8Matrix(matrix.codes.to(device), matrix.scale.to(device), matrix.block_rows)
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(matrix.codes.to(device), matrix.scale.to(device), matrix.rounds_rows)
    return type(matrix)(*(tensor.to(device) for tensor in matrix.tensors))


def joined(matrices: Sequence[QuantisedMatrix]) -> QuantisedMatrix:
    """Matrices of one kind, width and grouping, one below the other. Raises ValueError where they differ in these."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if any(type(matrix) is not type(first) for matrix in matrices):
        raise ValueError("matrices that are held in different ways cannot be joined")
    blocks = [matrix for matrix in matrices if isinstance(matrix, Fp8Matrix)]
    if blocks:
        whole = all(matrix.block_rows == FP8_BLOCK for matrix in blocks)
        if not whole or any(matrix.shape[0] % FP8_BLOCK for matrix in blocks[:-1]):
            blocks = [matrix.by_row() for matrix in blocks]
        codes, scale = (torch.cat(tensors) for tensors in zip(*(matrix.tensors for matrix in blocks), strict=True))
        return Fp8Matrix(codes, scale, blocks[0].block_rows)
    if len({len(matrix.tensors) for matrix in matrices}) > 1:
        raise ValueError("some of these int4 matrices have zero points and some have none")
    tensors = [torch.cat(parts) for parts in zip(*(matrix.tensors for matrix in matrices), strict=True)]
    return type(first)(*tensors)


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> None:
    """Raises ValueError unless C++ may read `tensor` as promised."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
        told = f"{tensor.dtype} {list(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"quantised weights: {name} is {told}: must be {dtype} {list(shape)}, contiguous")


def bits_per_weight(matrix: Matrix) -> float:
    """Bits held per value, scales included."""
    tensors = (matrix,) if isinstance(matrix, torch.Tensor) else matrix.tensors
    return 8 * sum(tensor.nbytes for tensor in tensors) / prod(matrix.shape)
