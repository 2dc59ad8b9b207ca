"""The experts of one layer that a replica holds, with the addresses of all their tensors in one array for native kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moiety_kernels.weights.expert_weights import ExpertWeights


class ExpertTable:
    """The held experts of one layer. A change of placement makes a new table, so a batch never sees half a change."""

    def __init__(self, experts: Mapping[int, ExpertWeights]) -> None:
        self.experts = experts  # by expert id
        self._addresses = torch.zeros(max(experts, default=-1) + 1, 8, dtype=torch.int64)  # by expert id
        if experts:
            self._addresses[list(experts)] = addresses(tuple(experts.values()))

    def select(self, experts: Sequence[int]) -> SelectedExperts:
        """Returns the experts of a batch, in the order of the ids `experts`. Raises KeyError for one that is not held."""
        selected = SelectedExperts(self.experts[expert] for expert in experts)
        selected.addresses = self._addresses[list(experts)]
        return selected


class SelectedExperts(tuple[ExpertWeights, ...]):
    """Experts whose addresses were gathered from an ExpertTable."""

    addresses: torch.Tensor


def addresses(experts: Sequence[ExpertWeights]) -> torch.Tensor:
    """Returns the addresses of the experts' tensors, int64 [E, 8]; 0 for those that their format does not have.

    In the order of `ExpertWeights.parts`. The caller keeps the experts alive.
    """
    if isinstance(experts, SelectedExperts):
        return experts.addresses
    return torch.tensor([expert.pointers for expert in experts])
