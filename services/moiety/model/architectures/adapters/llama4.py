"""Llama 4: a routing weight multiplies the row that goes into an expert, not the one that comes out.

transformers' block runs every expert on every token, scaled by zero where it is not chosen; an expert has no bias and
answers zero to zero, so that running only the chosen ones is the same sum.
"""

from __future__ import annotations

from typing import Any

import torch

from moiety.model.architectures.adapters.protocol import Parameter, RoutedExperts
from moiety.model.architectures.recognise import recognise_gated
from moiety.model.seam import remote_experts


class Llama4:
    """Serves Llama4TextExperts, and the Llama4TextMoe around it."""

    def recognise(self, module: Any) -> RoutedExperts:
        experts, hidden, inner = module.num_experts, module.hidden_size, module.expert_dim
        return RoutedExperts(
            recognise_gated(hidden, inner, glu=module.act_fn),
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
            """hidden [1, T, D] -> rows [T, D] and router logits [T, E], as Llama4TextMoe's."""
            rows = hidden.reshape(-1, block.hidden_dim)
            scores, logits = block.router(rows)
            index = logits.topk(block.top_k, dim=1).indices  # [T, K]
            weights = scores.gather(1, index)
            # One call per choice: a call's rows are the step's tokens, and each choice scales them by its own weight.
            routed = [module(rows * weights[:, k, None], index[:, k, None]) for k in range(block.top_k)]
            return block.shared_expert(rows) + sum(routed[1:], routed[0]), logits

        module.forward = experts
        block.forward = forward
