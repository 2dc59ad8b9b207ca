"""NLLB-MoE (arXiv:2207.04672): GShard's two experts a token (arXiv:2006.16668), with a capacity per expert.

Routes as transformers' NllbMoeTop2Router does, one sequence at a time. Computes the experts as the paper and the
fairseq code behind the published weights do: each token's own two experts, weighted by the token's gates. transformers
5 up to 5.23 computes something else: its `NllbMoeExperts` reads the router's 0/1 mask as expert ids. Every token then
gets experts 0 and 1 and no others, and the published weights give nonsense.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.functional import one_hot

from moiety.model.architectures.adapters.listed import Listed, router_logits
from moiety.model.seam import current_context


class Nllb(Listed):
    """Adapter for NLLB-MoE."""

    experts_class = "NllbMoeExperts"
    names = MappingProxyType(
        {"gate_up": "fc1.weight", "down": "fc2.weight", "gate_up_bias": "fc1.bias", "down_bias": "fc2.bias"}
    )

    def amend(self, config: Any) -> None:
        """Sets the top-k, which the config does not state. Raises ValueError if the second expert is drawn at random."""
        if config.second_expert_policy != "all":
            policy = f"second_expert_policy {config.second_expert_policy!r}"
            raise ValueError(f"{policy} draws experts at random: must be 'all'")
        config.moe_top_k = 2

    def route(self, block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses two experts for each of the T tokens in `hidden`: returns expert ids [T, 2] and weights [T, 2].

        `hidden` has the tokens of several sequences, one sequence after the other. An id is -1 if its expert is over capacity.
        """
        router = block.router
        logits = router_logits(router, hidden)
        probabilities = logits.softmax(-1, dtype=router.dtype).to(hidden.dtype)  # [T, E]
        first = probabilities.argmax(-1, keepdim=True)
        chosen = torch.cat((first, logits.scatter(1, first, -torch.inf).argmax(-1, keepdim=True)), dim=1)  # [T, 2]
        gates = probabilities.gather(1, chosen)
        lengths = current_context().encoding
        kept = torch.ones_like(chosen, dtype=torch.bool)
        if lengths is not None:
            parts = zip(chosen.split(lengths), probabilities.amax(-1).split(lengths), strict=True)
            kept = torch.cat([_within_capacity(router, ids, importance) for ids, importance in parts])
        counted = gates if router.normalize_router_prob_before_dropping else gates * kept
        gates = gates / counted.sum(1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)
        # Training masks a share of the experts' outputs; inference scales all of them by the share that was kept.
        return chosen.masked_fill(~kept, -1), gates * kept * (1 - block.experts.moe_token_dropout)


def _within_capacity(router: Any, chosen: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Returns bool [n, 2]: whether each choice in one sequence's `chosen` [n, 2] is within its expert's capacity.

    Experts take all first choices before any second choice. Tokens come in order, or by falling `importance` [n] if
    the router has `batch_prioritized_routing`.
    """
    fraction = router.moe_eval_capacity_token_fraction
    capacity = math.ceil(fraction * len(chosen)) if fraction > 0 else _fixed_capacity(router, len(chosen))
    order = (
        (-importance).argsort() if router.batch_prioritized_routing else torch.arange(len(chosen), device=chosen.device)
    )
    first, second = (one_hot(chosen[order, k], router.num_experts) for k in (0, 1))  # [n, E]
    places = torch.stack((first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0)), dim=1)  # [n, 2, E]
    kept = torch.empty_like(chosen, dtype=torch.bool)
    kept[order] = places.gather(2, chosen[order].unsqueeze(2))[..., 0] < capacity
    return kept


def _fixed_capacity(router: Any, tokens: int) -> int:
    fixed: int | None = router.expert_capacity
    return 2 * math.ceil(tokens / router.num_experts) if fixed is None else fixed
