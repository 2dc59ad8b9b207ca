"""Top-k gating in plain torch: the definition against which the fused kernel is tested.

Shape legend: T tokens, E experts, K experts per token, G groups of E / G experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCORES = ("softmax", "softmax_after", "sigmoid")
GROUP_SCORES = ("max", "top_two")


@dataclass(frozen=True, slots=True)
class Gate:
    """How a model chooses and weighs a token's experts.

    `scores`: `softmax` over all logits (Mixtral, Qwen3, DeepSeek-V2), `softmax_after` over the K chosen logits (gpt-oss), or
    `sigmoid` (DeepSeek-V3). `renormalise`: the K weights add up to 1 before `scaling`. With `groups` > 1 only experts of
    the `kept_groups` best groups can be chosen. A group's score is its best expert's (`max`), or the sum of its two best
    (`top_two`).
    """

    top_k: int
    scores: str = "softmax"
    renormalise: bool = False
    scaling: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_score: str = "max"

    def check(self, experts: int) -> None:
        """Raises ValueError where this gate cannot choose among `experts` experts."""
        if self.scores not in SCORES:
            raise ValueError(f"gate: scores {self.scores!r}: must be one of {', '.join(SCORES)}")
        if self.group_score not in GROUP_SCORES:
            raise ValueError(f"gate: group_score {self.group_score!r}: must be one of {', '.join(GROUP_SCORES)}")
        if self.groups < 1 or experts % self.groups or not 1 <= self.kept_groups <= self.groups:
            raise ValueError(
                f"gate: groups {self.groups}, kept_groups {self.kept_groups}: groups must divide {experts} experts,"
                " kept_groups must be 1 to groups"
            )
        if self.group_score == "top_two" and self.groups > 1 and experts // self.groups < 2:
            raise ValueError(
                f"gate: group_score 'top_two' with {experts // self.groups} expert per group: must be 2 or more"
            )
        choices = experts // self.groups * self.kept_groups
        if not 1 <= self.top_k <= choices:
            raise ValueError(f"gate: top_k {self.top_k}: must be 1 to {choices}, the experts of the kept groups")


def gating_reference(
    logits: torch.Tensor, gate: Gate, *, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses each token's experts by `logits` [T, E]; returns their indices [T, K], best first, and weights [T, K].

    Weights are float64 if the logits are, else float32. Experts are chosen by score plus `bias` [E]; weights do not
    include `bias`. Of equally good experts, the one with the lower index comes first.
    """
    tokens, experts = logits.shape
    gate.check(experts)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.sigmoid() if gate.scores == "sigmoid" else logits
    scores = scores.softmax(-1) if gate.scores == "softmax" else scores
    choice = scores if bias is None else scores + bias
    if gate.groups > 1:
        grouped = choice.view(tokens, gate.groups, -1)
        group_score = (
            grouped.sort(dim=-1, descending=True).values[..., : 2 if gate.group_score == "top_two" else 1].sum(-1)
        )
        kept = group_score.sort(dim=-1, descending=True, stable=True).indices[:, : gate.kept_groups]  # [T, kept]
        mask = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, kept, True)
        choice = grouped.masked_fill(~mask[:, :, None], -torch.inf).view(tokens, experts)
    index = choice.sort(dim=-1, descending=True, stable=True).indices[:, : gate.top_k]
    weights = scores.gather(1, index)
    if gate.scores == "softmax_after":
        weights = weights.softmax(-1)
    if gate.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return index, weights * gate.scaling
