"""Switch Transformers (arXiv:2101.03961): one expert a token, and a capacity per expert and sequence.

An expert takes a sequence's tokens in order up to its capacity; further tokens skip the block. The decoder routes each
token alone, as transformers' cached decode does, so capacity never applies there.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch

from moiety.model.architectures.adapters.listed import Listed, router_logits
from moiety.model.seam import current_context


class Switch(Listed):
    """Adapter for Switch Transformers."""

    experts_class = "SwitchTransformersExperts"
    names = MappingProxyType({"gate_up": "wi.weight", "down": "wo.weight"})

    def amend(self, config: Any) -> None:
        """Sets what the config does not state: one expert a token, and 512 tokens of context, as in training.

        The model's relative positions would allow a context of any length.
        """
        config.moe_top_k = 1
        if not hasattr(config, "n_positions"):
            config.n_positions = 512

    def route(self, block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses one expert for each of the T tokens in `hidden`: returns expert ids [T, 1] and weights [T, 1].

        `hidden` has the tokens of several sequences, one sequence after the other; each sequence is routed as
        SwitchTransformersTop1Router would route it. An id is -1 if its expert is over capacity.
        """
        router = block.router
        probabilities = router_logits(router, hidden).softmax(-1, dtype=router.dtype).to(hidden.dtype)
        chosen = probabilities.argmax(-1)  # [T]
        lengths = current_context().encoding
        if lengths is not None:
            dispatch = torch.nn.functional.one_hot(chosen, router.num_experts)
            place = torch.cat([sequence.cumsum(0) for sequence in dispatch.split(lengths)]).gather(1, chosen[:, None])
            chosen = chosen.masked_fill(place[:, 0] > router.expert_capacity, -1)
        return chosen[:, None], probabilities.amax(-1, keepdim=True)
