"""Llama 4: a routing weight multiplies an expert's input row, not its output row.

transformers' block runs every expert on every token, and multiplies an expert's input row by zero if the token did not
choose the expert. Experts have no bias, so a row of zeros gives zeros. Running only the chosen experts gives the same
sum.
"""

from __future__ import annotations

from typing import Any

import torch

from moiety.model.architectures.adapters.adapter import Adapter
from moiety.model.architectures.recognise import Parameter, RoutedExperts, recognise_activation
from moiety.model.seam import remote_experts


class Llama4(Adapter):
    """Adapter for Llama 4; also replaces the forward of the Llama4TextMoe block around the experts."""

    experts_class = "Llama4TextExperts"

    def recognise(self, module: Any) -> RoutedExperts:
        experts, hidden, inner = module.num_experts, module.hidden_size, module.expert_dim
        return RoutedExperts(
            recognise_activation(hidden, inner, module.act_fn),
            {
                "gate_up": (Parameter("gate_up_proj", (experts, hidden, 2 * inner)),),
                "down": (Parameter("down_proj", (experts, inner, hidden)),),
            },
            transposed=frozenset({"gate_up", "down"}),
        )

    def patch(self, block: Any, module: Any) -> None:
        def experts(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return remote_experts(module, rows, index, rows.new_ones(index.shape))

        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Returns output rows [T, D] and router logits [T, E] for hidden [1, T, D], as Llama4TextMoe does."""
            rows = hidden.reshape(-1, block.hidden_dim)
            scores, logits = block.router(rows)
            index = logits.topk(block.top_k, dim=1).indices  # [T, K]
            weights = scores.gather(1, index)
            # One call per choice k: a call has one input row per token, and each choice scales it by its own weight.
            routed = [module(rows * weights[:, k, None], index[:, k, None]) for k in range(block.top_k)]
            return block.shared_expert(rows) + sum(routed[1:], routed[0]), logits

        module.forward = experts
        block.forward = forward
