"""What every quantised weight matrix offers. Matrices keep the layout they are published in, one row per output feature.

Legend: O output features (rows), D input features (columns), G groups of columns that share a scale.
"""

from __future__ import annotations

from math import prod
from typing import Protocol

import torch


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


def check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> None:
    """Raises ValueError unless C++ may read `tensor` as promised."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
        told = f"{tensor.dtype} {list(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"quantised weights: {name} is {told}: must be {dtype} {list(shape)}, contiguous")


def bits_per_weight(matrix: Matrix) -> float:
    """Bits held per value, scales included."""
    tensors = (matrix,) if isinstance(matrix, torch.Tensor) else matrix.tensors
    return 8 * sum(tensor.nbytes for tensor in tensors) / prod(matrix.shape)
