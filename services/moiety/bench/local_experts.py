"""Computes all experts in the engine's own process: the baseline that experts in services are compared with.

Legend: T tokens, K experts per token (top-k), D hidden size, A = T * K assignments.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from moiety.core.expert_backend import ComputedRows
from moiety.core.experts import ExpertMLP
from moiety.model.activation import activation_of
from moiety.router.step_context import StepContext
from moiety_kernels.ops.expert_mlp import grouped_expert_mlp
from moiety_kernels.weights.expert_weights import ExpertWeights


class LocalExperts:
    """A StepBackend that computes each layer in `submit`, with the kernels of the expert replicas. All steps share it."""

    def __init__(self, mlp: ExpertMLP, weights: Mapping[tuple[int, int], ExpertWeights]):
        self._activation, self._weights = activation_of(mlp), weights
        self.layer_began_ns = 0
        self.compute_s: list[float] = []  # seconds of each layer since the list was last cleared

    def begin_step(self, step: StepContext) -> LocalExperts:
        self.layer_began_ns = time.time_ns()
        return self

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> ComputedRows:
        """Computes the experts of layer `layer` for hidden [T, D] routed to top_k_index [T, K] (int64, -1 = no expert)."""
        began, top_k = time.perf_counter(), top_k_index.shape[1]
        experts = top_k_index.reshape(-1)  # [A]
        order = experts.argsort(stable=True)
        order = order[experts[order] >= 0]
        activated, counts = torch.unique_consecutive(experts[order], return_counts=True)
        computed = grouped_expert_mlp(
            hidden[order // top_k],
            counts.tolist(),
            [self._weights[layer, expert] for expert in activated.tolist()],
            self._activation,
        )
        output = hidden.new_zeros(len(experts), hidden.shape[1])
        output[order] = computed
        self.compute_s.append(time.perf_counter() - began)
        self.layer_began_ns = time.time_ns()
        return ComputedRows(output.view(*top_k_index.shape, -1))

    def poll(self) -> None:
        """Does nothing: `submit` computes the layer itself, so no messages arrive."""
