"""The hop of a model whose experts are served in slices: sends each row to all slices of its experts and sums the results.

Legend: T tokens, K experts per token, S slices per expert, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moiety.core.expert_backend import ExpertBackend, PendingRows


@dataclass(frozen=True, slots=True)
class SlicedExperts:
    """An ExpertBackend that takes rows for whole experts and sends them, in float32, to a backend whose experts are slices."""

    backend: ExpertBackend
    slices: int

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> PendingRows:
        """Sends hidden [T, D] to every slice of the experts in top_k_index [T, K] (int64, -1: none)."""
        tokens, top_k = top_k_index.shape
        numbers = torch.arange(self.slices, device=top_k_index.device)
        slices = top_k_index[:, :, None] * self.slices + numbers  # [T, K, S]
        slices = slices.masked_fill(top_k_index[:, :, None] < 0, -1)
        partial = self.backend.submit(layer, hidden.float(), slices.view(tokens, top_k * self.slices))
        return _Sum(partial, (tokens, top_k, self.slices), hidden.dtype)


@dataclass(frozen=True, slots=True)
class _Sum:
    """The PendingRows of a sliced layer: waits for the partial rows of all slices and sums them."""

    partial: PendingRows
    shape: tuple[int, int, int]  # T, K, S
    dtype: torch.dtype

    def result(self) -> torch.Tensor:
        """Returns [T, K, D]: the slices' rows summed in float32 in slice order, then rounded to the model's dtype."""
        rows = self.partial.result().view(*self.shape, -1)  # [T, K, S, D]
        total = rows[:, :, 0].clone()
        for number in range(1, self.shape[2]):
            total += rows[:, :, number]
        return total.to(self.dtype)
