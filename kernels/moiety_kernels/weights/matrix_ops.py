"""Operations on matrices of any format: copying to another device, and joining along the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moiety_kernels.weights.fp8 import FP8_BLOCK, Fp8Matrix
from moiety_kernels.weights.int8 import Int8Matrix
from moiety_kernels.weights.matrix import Matrix, QuantisedMatrix


def to_device(matrix: Matrix, device: torch.device | str) -> Matrix:
    """Returns the same matrix on `device`."""
    if isinstance(matrix, torch.Tensor):
        return matrix.to(device)
    if isinstance(matrix, Fp8Matrix):
        return Fp8Matrix(matrix.codes.to(device), matrix.scale.to(device), matrix.block_rows)
    if isinstance(matrix, Int8Matrix):
        return Int8Matrix(matrix.codes.to(device), matrix.scale.to(device), matrix.rounds_rows)
    return type(matrix)(*(tensor.to(device) for tensor in matrix.tensors))


def concatenate(matrices: Sequence[QuantisedMatrix]) -> QuantisedMatrix:
    """Concatenates matrices of one format, width and grouping along their rows.

    Raises ValueError where their formats differ, or where only some int4 matrices have zero points.
    """
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if any(type(matrix) is not type(first) for matrix in matrices):
        formats = ", ".join(type(matrix).__name__ for matrix in matrices)
        raise ValueError(f"cannot join matrices of different formats: {formats}")
    blocks = [matrix for matrix in matrices if isinstance(matrix, Fp8Matrix)]
    if blocks:
        whole = all(matrix.block_rows == FP8_BLOCK for matrix in blocks)
        if not whole or any(matrix.shape[0] % FP8_BLOCK for matrix in blocks[:-1]):
            blocks = [matrix.by_row() for matrix in blocks]
        codes, scale = (torch.cat(tensors) for tensors in zip(*(matrix.tensors for matrix in blocks), strict=True))
        return Fp8Matrix(codes, scale, blocks[0].block_rows)
    if len({len(matrix.tensors) for matrix in matrices}) > 1:
        raise ValueError("cannot join int4 matrices: some have zero points and some have none")
    tensors = [torch.cat(parts) for parts in zip(*(matrix.tensors for matrix in matrices), strict=True)]
    return type(first)(*tensors)
