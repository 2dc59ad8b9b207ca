"""Shared code of the adapters for blocks that hold each expert as its own module: `expert_0`, `expert_1`, …"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moiety.model.architectures.adapters.adapter import Adapter
from moiety.model.architectures.recognise import Parameter, RoutedExperts, recognise_activation
from moiety.model.checkpoint.checkpoint import EXPERT
from moiety.model.seam import remote_experts


class Listed(Adapter):
    """Adapts an architecture whose MoE blocks hold each expert as its own module; its subclass says how tokens are routed."""

    names: Mapping[str, str]  # field of ExpertWeights -> an expert's parameter

    def route(self, block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses K experts for each of the T tokens in `hidden`: returns expert ids int64 [T, K] and weights [T, K].

        `hidden` [T, D] has the tokens of several sequences, one sequence after the other. An id is -1 for no expert.
        """
        raise NotImplementedError

    def recognise(self, module: Any) -> RoutedExperts:
        first = module["expert_0"]
        shapes = {field: tuple(first.get_parameter(name).shape) for field, name in self.names.items()}
        hidden, intermediate = shapes["down"]
        return RoutedExperts(
            recognise_activation(hidden, intermediate, first.act, gated=False, biased="down_bias" in self.names),
            {
                field: (Parameter(f"expert_{EXPERT}.{name}", (module.num_experts, *shapes[field])),)
                for field, name in self.names.items()
            },
        )

    def patch(self, block: Any, module: Any) -> None:
        def forward(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            return remote_experts(module, rows, *self.route(block, rows)).view(hidden_states.shape)

        block.forward = forward
        block._is_hf_initialized = True  # or transformers would initialise the experts' weights, which are gone


def router_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Computes the scores [T, E] of hidden [T, D], in the gate's own dtype."""
    classifier, dtype = router.classifier, router.dtype
    bias = None if classifier.bias is None else classifier.bias.to(dtype)
    return nn.functional.linear(hidden.to(dtype), classifier.weight.to(dtype), bias)
