"""LongCat-Flash: behind the routed experts stand zero-computation ones, which answer the row they are given.

Those never leave the router: to the hop a token that chose one has one expert less (arXiv:2509.01322, section 2.1).
"""

from __future__ import annotations

from typing import Any

import torch

from moiety.model.adapters.protocol import Parameter, RoutedExperts
from moiety.model.probe import probe
from moiety.model.seam import remote_experts


class Longcat:
    """Serves LongcatFlashExperts."""

    def describe(self, module: Any) -> RoutedExperts:
        experts, hidden, inner = module.num_routed_experts, module.hidden_size, module.intermediate_size
        return RoutedExperts(
            probe(hidden, inner, glu=module.act_fn),
            {
                # transformers gives the zero experts rows in gate_up_proj, too; they are never read.
                "gate_up": (Parameter("gate_up_proj", (experts, 2 * inner, hidden)),),
                "down": (Parameter("down_proj", (experts, hidden, inner)),),
            },
        )

    def install(self, block: Any, module: Any) -> None:
        def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            zero = top_k_index >= module.num_routed_experts  # [T, K]
            routed = remote_experts(module, hidden, top_k_index.masked_fill(zero, -1), top_k_weights)
            kept = (top_k_weights * zero).sum(dim=1, keepdim=True)
            return routed + (hidden * kept).to(hidden.dtype)

        module.forward = forward
