"""Shared code of the adapters for blocks that hold each expert as its own module: `expert_0`, `expert_1`, …"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from moiety.model.architectures.adapters.protocol import Parameter, RoutedExperts
from moiety.model.architectures.recognise import recognise_plain
from moiety.model.checkpoint.checkpoint import EXPERT
from moiety.model.seam import remote_experts

# (block, hidden [T, D]) -> expert ids int64 [T, K], -1 for no expert, and their weights [T, K].
Route = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def recognise_listed(module: Any, names: Mapping[str, str]) -> RoutedExperts:
    """Describes a module whose children are experts; `names` maps fields of ExpertWeights to an expert's parameter names.

    Raises ValueError if no kernel computes the experts' activation.
    """
    first = module["expert_0"]
    shapes = {field: tuple(first.get_parameter(name).shape) for field, name in names.items()}
    hidden, intermediate = shapes["down"]
    return RoutedExperts(
        recognise_plain(hidden, intermediate, first.act, biased="down_bias" in names),
        {
            field: (Parameter(f"expert_{EXPERT}.{name}", (module.num_experts, *shapes[field])),)
            for field, name in names.items()
        },
    )


def patch_block(block: Any, route: Route) -> None:
    """Replaces a MoE block's forward: `route` chooses experts, and `seam.remote_experts` returns their weighted sum."""

    def forward(block: Any, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return remote_experts(block.experts, rows, *route(block, rows)).view(hidden_states.shape)

    block.forward = MethodType(forward, block)
    block._is_hf_initialized = True  # or transformers would initialise the experts' weights, which are gone


def router_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Computes the scores [T, E] of hidden [T, D], in the gate's own dtype."""
    classifier, dtype = router.classifier, router.dtype
    bias = None if classifier.bias is None else classifier.bias.to(dtype)
    return nn.functional.linear(hidden.to(dtype), classifier.weight.to(dtype), bias)
