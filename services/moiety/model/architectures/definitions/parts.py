"""Shared parts of the definitions: a decoder with Llama's parts around a subclass's own layers, and a MoE block.

Legend: T tokens, E experts, K top-k, D hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations.moe import use_experts_implementation
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel


class Gate(nn.Module):
    """Picks experts by softmax in float32, then top k; `normalise` makes the K weights add up to one."""

    def __init__(self, hidden: int, experts: int, top_k: int, *, normalise: bool):
        super().__init__()
        self.top_k, self.normalise = top_k, normalise
        self.weight = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns expert ids [T, K] and weights [T, K] for rows [T, D]."""
        scores = functional.linear(rows, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, index = scores.topk(self.top_k, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return index, weights.to(rows.dtype)


class _Experts(nn.Module):
    """E experts with stacked weights. transformers' experts interface computes them; in a router it calls the hop instead."""

    def __init__(self, config: Any, experts: int, intermediate: int):
        super().__init__()
        self.num_experts = experts
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, intermediate))

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("set an experts implementation of transformers, such as grouped_mm")


@use_experts_implementation
class GatedExperts(_Experts):
    """Experts that compute down(act(gate(x)) * up(x))."""

    def __init__(self, config: Any, experts: int, intermediate: int):
        super().__init__(config, experts, intermediate)
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, config.hidden_size))


@use_experts_implementation(has_gate=False)
class PlainExperts(_Experts):
    """Experts that compute down(act(up(x)))."""

    def __init__(self, config: Any, experts: int, intermediate: int):
        super().__init__(config, experts, intermediate)
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate, config.hidden_size))


class MoE(nn.Module):
    """A MoE block: a gate and its experts."""

    def __init__(self, gate: Gate, experts: nn.Module):
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the experts' weighted sum [1, T, D] for hidden [1, T, D]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        output: torch.Tensor = self.experts(rows, *self.gate(rows))
        return output.view(hidden.shape)


class GatedMLP(nn.Module):
    """A dense MLP with Mixtral's names: w2(act(w1(x)) * w3(x))."""

    def __init__(self, hidden: int, intermediate: int, activation: str):
        super().__init__()
        self.w1 = nn.Linear(hidden, intermediate, bias=False)
        self.w2 = nn.Linear(intermediate, hidden, bias=False)
        self.w3 = nn.Linear(hidden, intermediate, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the MLP's output [..., D] for hidden [..., D]."""
        output: torch.Tensor = self.w2(self.act_fn(self.w1(hidden)) * self.w3(hidden))
        return output


class Decoder(LlamaModel):
    """Llama's embedding, rotary positions and final norm, around layers that `layer_class(config, index)` makes."""

    def __init__(self, config: Any, layer_class: type[nn.Module]):
        super().__init__(config)
        self.layers = nn.ModuleList([layer_class(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()


class CausalLM(LlamaForCausalLM):
    """A decoder with layers of class `layer_class`, and Llama's language-model head."""

    layer_class: type[nn.Module]
    decoder_class = Decoder

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = self.decoder_class(config, self.layer_class)
        self.post_init()


def stacked(block: str, gate_up: tuple[str, ...], down: str) -> list[WeightConverter]:
    """Returns the weight conversions that stack the published tensors of all experts into one tensor per parameter."""
    target = "gate_up_proj" if len(gate_up) > 1 else "up_proj"
    joins = [Concatenate(dim=1)] if len(gate_up) > 1 else []
    return [
        WeightConverter(
            [rf"{block}.experts.*.{name}.weight" for name in gate_up],
            f"{block}.experts.{target}",
            [MergeModulelist(dim=0), *joins],
        ),
        WeightConverter([rf"{block}.experts.*.{down}.weight"], f"{block}.experts.down_proj", [MergeModulelist(dim=0)]),
    ]
