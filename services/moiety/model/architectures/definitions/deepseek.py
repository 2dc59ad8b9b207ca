"""DeepSeek-MoE 16B (arXiv:2401.06066; `deepseek-ai/deepseek-moe-16b-base`): fine-grained routed experts beside shared ones.

The attention is Llama's. The first `first_k_dense_replace` layers (published: 1) are dense; of the other layers, those
whose index is a multiple of `moe_layer_freq` (published: 1) have a MoE. Tensor names: `mlp.gate.weight`,
`mlp.experts.N.{gate,up,down}_proj.weight`, `mlp.shared_experts.{gate,up,down}_proj.weight`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from moiety.model.architectures.definitions.parts import CausalLM, Gate, GatedExperts, MoE, stacked


class Config(LlamaConfig):
    """Llama's config with the fields that DeepSeek-MoE adds; their defaults are the values of deepseek-moe-16b."""

    model_type = "deepseek"

    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1408
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def validate_architecture(self) -> None:
        """Raises ValueError if `scoring_func` is not softmax: no published checkpoint has another one."""
        super().validate_architecture()
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func {self.scoring_func!r}: must be softmax")


class SharedAndRouted(MoE):
    """A MoE block that adds its shared experts' output, unweighted, to its routed experts' output."""

    def __init__(self, config: Any):
        gate = Gate(
            config.hidden_size, config.n_routed_experts, config.num_experts_per_tok, normalise=config.norm_topk_prob
        )
        super().__init__(gate, GatedExperts(config, config.n_routed_experts, config.moe_intermediate_size))
        if config.n_shared_experts:
            self.shared_experts = LlamaMLP(config)
            for name in ("gate_proj", "up_proj", "down_proj"):
                wide, narrow = config.moe_intermediate_size * config.n_shared_experts, config.hidden_size
                sizes = (wide, narrow) if name == "down_proj" else (narrow, wide)
                setattr(self.shared_experts, name, torch.nn.Linear(*sizes, bias=False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        routed = super().forward(hidden)
        return routed + self.shared_experts(hidden) if hasattr(self, "shared_experts") else routed


class Layer(LlamaDecoderLayer):
    """A Llama layer; if index >= `first_k_dense_replace` and index % `moe_layer_freq` == 0, a MoE replaces its MLP."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        if index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
            self.mlp = SharedAndRouted(config)


class DeepseekForCausalLM(CausalLM):
    """DeepSeek-MoE's decoder and language-model head, under the published class name."""

    config: Config
    config_class = Config
    layer_class = Layer


register_checkpoint_conversion_mapping(
    "deepseek", stacked("mlp", ("gate_proj", "up_proj"), "down_proj"), overwrite=True
)
