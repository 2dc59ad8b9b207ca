"""DBRX: one matrix per projection holds the rows of all experts, one expert after the other.

The down projection is published [in, out]. transformers' DBRX block passes its experts a batch [1, T, D], unlike the
experts interface, which passes rows [T, D] (T tokens, D hidden).
"""

from __future__ import annotations

from typing import Any

import torch

from moiety.model.architectures.adapters.adapter import Adapter
from moiety.model.architectures.recognise import Parameter, RoutedExperts, recognise_activation
from moiety.model.seam import remote_experts


class Dbrx(Adapter):
    """Adapter for DBRX."""

    experts_class = "DbrxExperts"

    def amend(self, config: Any) -> None:
        # transformers 5.23 ignores the published `attn_config.rope_theta` (500000) and rotates by its default base.
        config.rope_parameters["rope_theta"] = config.attn_config.rope_theta
        config.moe_top_k = config.ffn_config.moe_top_k

    def recognise(self, module: Any) -> RoutedExperts:
        shape = module.num_experts, module.ffn_hidden_size, module.hidden_size  # [E, I, D], also w2's
        return RoutedExperts(
            recognise_activation(module.hidden_size, module.ffn_hidden_size, module.mlp.activation_fn),
            {
                "gate_up": (Parameter("mlp.w1", shape), Parameter("mlp.v1", shape)),
                "down": (Parameter("mlp.w2", shape),),
            },
            transposed=frozenset({"down"}),
        )

    def patch(self, block: Any, module: Any) -> None:
        def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            rows = hidden.reshape(-1, hidden.shape[-1])
            return remote_experts(module, rows, top_k_index, top_k_weights).view(hidden.shape)

        module.forward = forward
