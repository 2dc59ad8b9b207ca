"""Snowflake Arctic (`Snowflake/snowflake-arctic-instruct`): a dense transformer with a MoE beside its residual MLP.

    a = x + attention(norm(x));   y = a + residual_mlp(residual_norm(a)) + moe(post_norm(x))

The MoE reads the layer's input, not the output of attention. A layer without MoE is like Mixtral's, but with a dense
MLP. If `parallel_attn_mlp_res` is off, layers with MoE are Mixtral's, too. Tensor names:
`block_sparse_moe.gate.weight`, `block_sparse_moe.experts.N.{w1,w2,w3}.weight`; in a layer without MoE
`block_sparse_moe.mlp.{w1,w2,w3}.weight`; `residual_layernorm`, `residual_mlp.{w1,w2,w3}` (as wide as the model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from moiety.model.architectures.definitions.parts import CausalLM, Gate, GatedExperts, GatedMLP, MoE, stacked


class Config(LlamaConfig):
    """Llama's config with the fields that Arctic adds."""

    model_type = "arctic"

    num_local_experts: int = 128
    num_experts_per_tok: int = 2
    moe_layer_frequency: int = 2
    parallel_attn_mlp_res: bool = False


class DenseBlock(nn.Module):
    """The dense MLP that an Arctic layer without MoE has as its `block_sparse_moe`."""

    def __init__(self, config: Any):
        super().__init__()
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the MLP's output [1, T, D] for hidden [1, T, D]."""
        output: torch.Tensor = self.mlp(hidden)
        return output


class Layer(GradientCheckpointingLayer):
    """One Arctic layer: with a residual MLP beside its MoE (the formula at the top of this file), or like a Mixtral layer."""

    def __init__(self, config: Any, index: int):
        super().__init__()
        hidden, top_k = config.hidden_size, config.num_experts_per_tok
        self.self_attn = LlamaAttention(config, index)
        self.input_layernorm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, config.rms_norm_eps)
        sparse = (index + 1) % config.moe_layer_frequency == 0
        self.parallel = sparse and config.parallel_attn_mlp_res
        if sparse:
            gate = Gate(hidden, config.num_local_experts, top_k, normalise=top_k > 1)
            experts = GatedExperts(config, config.num_local_experts, config.intermediate_size)
            self.block_sparse_moe: nn.Module = MoE(gate, experts)
        else:
            self.block_sparse_moe = DenseBlock(config)
        if self.parallel:
            self.residual_layernorm = LlamaRMSNorm(hidden, config.rms_norm_eps)
            self.residual_mlp = GatedMLP(hidden, hidden, config.hidden_act)

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """Returns the layer's output [1, T, D] for hidden_states [1, T, D]; passes `options` to attention."""
        attended = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **options)[0]
        if not self.parallel:
            return attended + self.block_sparse_moe(self.post_attention_layernorm(attended))
        dense = attended + self.residual_mlp(self.residual_layernorm(attended))
        return dense + self.block_sparse_moe(self.post_attention_layernorm(hidden_states))


class ArcticForCausalLM(CausalLM):
    """Arctic's decoder and language-model head, under the published class name."""

    config: Config
    config_class = Config
    layer_class = Layer


register_checkpoint_conversion_mapping("arctic", stacked("block_sparse_moe", ("w1", "w3"), "w2"), overwrite=True)
