"""LongCat-Flash has zero-computation experts, which return their input row. Their ids follow the routed experts' ids.

The router computes zero-computation experts itself (arXiv:2509.01322, section 2.1). Rows for them skip the hop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moiety.model.architectures.adapters.adapter import Adapter
from moiety.model.architectures.recognise import Parameter, RoutedExperts, recognise_activation
from moiety.model.seam import remote_experts


class Longcat(Adapter):
    """Adapter for LongCat-Flash."""

    experts_class = "LongcatFlashExperts"

    def published_class(self, model_class: Any) -> Any:
        """Returns a subclass of `model_class` that has no weights for the zero-computation experts.

        No checkpoint has these weights and nothing reads them. transformers 5.23 stacks them with the routed experts' weights
        in `gate_up_proj`, and therefore cannot load LongCat-Flash.
        """

        def __init__(model: Any, *arguments: Any, **options: Any) -> None:
            model_class.__init__(model, *arguments, **options)
            for module in filter(self.holds_experts, model.modules()):
                module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach()[: module.num_routed_experts])

        # With another `__module__`, transformers would treat the class as custom code and skip weight conversions.
        return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})

    def recognise(self, module: Any) -> RoutedExperts:
        experts, hidden, inner = module.num_routed_experts, module.hidden_size, module.intermediate_size
        return RoutedExperts(
            recognise_activation(hidden, inner, module.act_fn),
            {
                "gate_up": (Parameter("gate_up_proj", (experts, 2 * inner, hidden)),),
                "down": (Parameter("down_proj", (experts, hidden, inner)),),
            },
        )

    def patch(self, block: Any, module: Any) -> None:
        def forward(hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            zero = top_k_index >= module.num_routed_experts  # [T, K]
            routed = remote_experts(module, hidden, top_k_index.masked_fill(zero, -1), top_k_weights)
            zero_weight = (top_k_weights * zero).sum(dim=1, keepdim=True)  # [T, 1]
            return routed + (hidden * zero_weight).to(hidden.dtype)

        module.forward = forward
