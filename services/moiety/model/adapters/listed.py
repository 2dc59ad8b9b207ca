"""What the adapters share of blocks whose experts are modules of their own, one beside the other: `expert_0`, `expert_1`…"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from moiety.core import ExpertMLP
from moiety.model.layout import EXPERT
from moiety.model.seam import remote_experts

# (block, hidden [T, D]) -> expert ids int64 [T, K], -1 where there is none, and their weights [T, K].
Route = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One architecture's MoE block."""

    experts_class: str  # of the module that holds the experts
    parameters: Mapping[str, str]  # field of ExpertWeights -> an expert's parameter
    top_k: int
    route: Route
    refusal: Callable[[Any], str | None]  # what of a block cannot be served, if anything

    def parameter(self, field: str) -> str:
        """The parameter behind a field of ExpertWeights, in the experts' module; `{expert}` stands for the number."""
        return f"expert_{EXPERT}.{self.parameters[field]}"

    def mlp(self, experts: Any) -> ExpertMLP:
        """The spec of one expert, but for its activation, which is found by `activation`."""
        down = experts["expert_0"].get_parameter(self.parameters["down"])
        return ExpertMLP(
            hidden=down.shape[0], intermediate=down.shape[1], gated=False, biased="down_bias" in self.parameters
        )

    def activation(self, experts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """What an expert applies between its two matrices."""
        activation: Callable[[torch.Tensor], torch.Tensor] = experts["expert_0"].act
        return activation

    def install(self, block: Any) -> None:
        """Gives a loaded block the forward that asks a backend for its experts' rows."""
        route = self.route

        def forward(block: Any, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            return remote_experts(block.experts, rows, *route(block, rows)).view(hidden_states.shape)

        block.forward = MethodType(forward, block)


def router_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The scores [T, E] of hidden [T, D], in the router's own dtype."""
    classifier, dtype = router.classifier, router.dtype
    bias = None if classifier.bias is None else classifier.bias.to(dtype)
    return nn.functional.linear(hidden.to(dtype), classifier.weight.to(dtype), bias)
