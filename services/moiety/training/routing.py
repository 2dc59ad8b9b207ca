"""What a Mixture-of-Experts layer needs while it learns: losses that spread the tokens, noise, and bounded capacity.

The model is plain transformers' Qwen3-MoE. `prepare` replaces its routers' forward and its expert computation; the weights
keep their names, so that what is saved is a published layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

EXPERTS = "moiety-training"  # the name of `compute_experts` in transformers' table


@dataclass(frozen=True, slots=True)
class Routing:
    """What one layer decided for a batch: `logits` float32[tokens, experts], `chosen` int64[tokens, top_k]."""

    logits: Tensor
    chosen: Tensor

    def counts(self) -> Tensor:
        """Returns int64[experts], how many choices fell on each expert."""
        return torch.bincount(self.chosen.flatten(), minlength=self.logits.shape[1])

    def use(self) -> Tensor:
        """Returns float32[experts], the share of all choices that fell on each expert; they add up to 1."""
        return self.counts() / self.chosen.numel()

    def balance_loss(self) -> Tensor:
        """Returns E * sum(use * mean probability): 1 where all experts are used alike, up to E where one takes all.

        The gradient lowers the probability of experts that are used too much. Source: Switch Transformers,
        arXiv 2101.03961, equation 4, for top_k choices.
        """
        return self.logits.shape[1] * torch.dot(self.use(), self.logits.softmax(-1).mean(0))

    def z_loss(self) -> Tensor:
        """Returns the mean square of logsumexp(logits): it keeps logits small, so that float32 and bfloat16 route alike.

        Source: ST-MoE, arXiv 2202.08906, equation 5.
        """
        return self.logits.logsumexp(-1).square().mean()


class TrainingRouter(Qwen3MoeTopKRouter):
    """A router that remembers what it decided, and that explores: noise is added to its logits before experts are chosen.

    The noise decides who is chosen; weights of the chosen experts come from the logits without it. Source of noisy
    choices: arXiv 1701.06538, section 2.1; here their size is the same for all experts, and falls to 0 while training.
    """

    def __init__(self, config: Qwen3MoeConfig):
        super().__init__(config)
        nn.init.normal_(self.weight, std=config.initializer_range)
        self.noise = 0.0  # standard deviation
        self.routing: Routing | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [tokens, experts], weights and ids of the chosen experts [tokens, top_k]."""
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores = logits + self.noise * torch.randn_like(logits) if self.training and self.noise else logits
        chosen = scores.topk(self.top_k, dim=-1).indices
        weights = logits.softmax(-1).gather(-1, chosen)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        self.routing = Routing(logits, chosen)
        return logits, weights, chosen


def compute_experts(layer: Qwen3MoeExperts, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Returns float32[tokens, hidden], the weighted sum of each token's experts.

    While training, an expert computes at most `layer.capacity_factor` times its even share, if that is set. Choices beyond
    that are dropped: their tokens go on with what their other choices give.
    """
    (tokens, top_k), experts, flat = chosen.shape, layer.num_experts, chosen.flatten()
    counts = torch.bincount(flat, minlength=experts)
    by_expert = flat.argsort(stable=True)  # earlier tokens come first
    factor: float | None = getattr(layer, "capacity_factor", None)
    if layer.training and factor is not None:
        capacity = math.ceil(factor * tokens * top_k / experts)
        place = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[flat[by_expert]]
        by_expert, counts = by_expert[place < capacity], counts.clamp(max=capacity)
    layer.dropped = 1.0 - len(by_expert) / len(flat)
    token = by_expert // top_k
    parts = zip(
        hidden.index_select(0, token).split(counts.tolist()),
        layer.gate_up_proj.unbind(),
        layer.down_proj.unbind(),
        strict=True,
    )
    outputs = torch.cat([_expert(layer, rows, gate_up, down) for rows, gate_up, down in parts])
    return torch.zeros_like(hidden).index_add(0, token, outputs * weights.flatten()[by_expert, None])


def _expert(layer: Qwen3MoeExperts, rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    return F.linear(layer.act_fn(gate) * up, down)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, compute_experts)


def prepare(model: Qwen3MoeForCausalLM, capacity_factor: float | None) -> None:
    """Gives every Mixture-of-Experts layer of `model` a TrainingRouter, and its experts their capacity."""
    model.set_experts_implementation(EXPERTS)
    for layer in model.model.layers:
        layer.mlp.gate = TrainingRouter(model.config)
        layer.mlp.experts.capacity_factor = capacity_factor


def routers(model: nn.Module) -> list[TrainingRouter]:
    """Returns the routers of `model`, layer by layer; none for a dense one."""
    return [module for module in model.modules() if isinstance(module, TrainingRouter)]


def routings(model: nn.Module) -> list[Routing]:
    """Returns what each layer decided in the latest forward."""
    return [router.routing for router in routers(model) if router.routing is not None]


def dropped(model: nn.Module) -> float:
    """Returns the share of choices that found no slot in the latest forward, over all layers."""
    shares = [float(module.dropped) for module in model.modules() if isinstance(module, Qwen3MoeExperts)]
    return sum(shares) / len(shares) if shares else 0.0


def mean(losses: Iterable[Tensor]) -> Tensor:
    """Returns the mean over layers; 0 for none."""
    found = list(losses)
    return torch.stack(found).mean() if found else torch.zeros(())
