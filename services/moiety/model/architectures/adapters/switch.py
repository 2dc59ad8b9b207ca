"""Switch Transformers (arXiv:2101.03961): one expert a token, and a bound on what an expert takes of one sequence.

Tokens of a sequence are counted from its first on; what an expert cannot take any more goes past the block. In the decoder
a token comes alone, as it does in transformers' cached decode, so that the bound never holds it back.
"""

from __future__ import annotations

from typing import Any

import torch

from moiety.model.architectures.adapters import listed
from moiety.model.architectures.adapters.listed import router_logits
from moiety.model.architectures.adapters.protocol import RoutedExperts
from moiety.model.seam import sequence_lengths


def route(block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As SwitchTransformersTop1Router, for a row of several sequences: ids [T, 1] and weights [T, 1]."""
    router = block.router
    shares = router_logits(router, hidden).softmax(-1, dtype=router.dtype).to(hidden.dtype)
    chosen = shares.argmax(-1)  # [T]
    lengths = sequence_lengths()
    if lengths is not None:
        dispatch = torch.nn.functional.one_hot(chosen, router.num_experts)
        place = torch.cat([of_one.cumsum(0) for of_one in dispatch.split(lengths)]).gather(1, chosen[:, None])
        chosen = chosen.masked_fill(place[:, 0] > router.expert_capacity, -1)
    return chosen[:, None], shares.amax(-1, keepdim=True)


class Switch:
    """Serves SwitchTransformersExperts."""

    def recognise(self, module: Any) -> RoutedExperts:
        return listed.recognise_listed(module, {"gate_up": "wi.weight", "down": "wo.weight"})

    def patch(self, block: Any, module: Any) -> None:
        listed.patch_block(block, route)


def amend(config: Any) -> None:
    """Writes into a SwitchTransformersConfig what it leaves unsaid: one expert a token, and 512 tokens, as in training.

    Relative positions set no bound of their own.
    """
    config.moe_top_k = 1
    if not hasattr(config, "n_positions"):
        config.n_positions = 512
