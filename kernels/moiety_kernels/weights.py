"""The weights of one expert, in the orientation its checkpoint publishes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's tensors; O is 2I when gated, else I. Transposed experts store [D, O] and [I, D] instead."""

    gate_up: torch.Tensor  # [O, D]
    down: torch.Tensor  # [D, I]
    gate_up_bias: torch.Tensor | None = None  # [O]
    down_bias: torch.Tensor | None = None  # [D]

    @property
    def nbytes(self) -> int:
        """Bytes of storage that these weights keep alive."""
        tensors = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
