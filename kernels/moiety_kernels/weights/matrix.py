"""The interface of quantised weight matrices; like those of published checkpoints, they have one row per output feature.

Legend: O output features (rows), D input features (columns), G groups of columns that share a scale.
"""

from __future__ import annotations

from typing import Protocol

import torch


class QuantisedMatrix(Protocol):
    """A weight matrix [O, D] stored as codes and scales."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, D), the shape of the values."""
        ...

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The stored tensors, in the order of the fields."""
        ...

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the values [O, D], computed in float32 and rounded once."""
        ...


Matrix = torch.Tensor | QuantisedMatrix


def check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> None:
    """Raises ValueError unless `tensor` has this dtype and shape and is contiguous, as the C++ kernels assume."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"quantised weights: {name} is {found}: must be {dtype} {list(shape)}, contiguous")
