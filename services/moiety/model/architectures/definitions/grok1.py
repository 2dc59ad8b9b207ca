"""Grok-1 (xai-org/grok-1), in the Hugging Face layout of `hpcai-tech/grok-1`.

Each block has a norm before and after it. Attention logits are scaled by `attn_output_multiplier` and capped at
`max_attn_value` by tanh. Embeddings and output logits are scaled. Experts are gated by GELU. The gate takes the softmax
over all experts, then the top 2, whose weights are not normalised. Tensor names: `attn.{q,k,v,o}_proj`,
`moe_block.gate`, `moe_block.experts.N.{linear,linear_v,linear_1}.weight` (gate, up, down),
`{pre,post}_{attn,moe}_norm.scale`, `model.norm.scale`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from moiety.model.architectures.definitions.parts import CausalLM, Decoder, Gate, GatedExperts, MoE, stacked

NORMS = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")


class Config(LlamaConfig):
    """Llama's config with Grok-1's own fields. The fields listed here default to Grok-1's values, all others to Llama's."""

    model_type = "grok-1"

    hidden_act: str = "gelu"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    attn_output_multiplier: float = 0.08838834764831845
    max_attn_value: float = 30.0
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257
    tie_word_embeddings: bool = True


class Attention(LlamaAttention):
    """Llama's attention, with its logits scaled by `attn_output_multiplier` and capped at `max_attn_value`.

    The cap needs an attention function that applies `softcap`.
    """

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.scaling = config.attn_output_multiplier

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
        """Same arguments and result as LlamaAttention."""
        return super().forward(hidden_states, softcap=self.config.max_attn_value, **options)


class Layer(GradientCheckpointingLayer):
    """One Grok-1 layer: attention, then the MoE, each between two norms and with a residual connection."""

    def __init__(self, config: Any, index: int):
        super().__init__()
        gate = Gate(config.hidden_size, config.num_experts, config.num_experts_per_tok, normalise=False)
        self.attn = Attention(config, index)
        self.moe_block = MoE(gate, GatedExperts(config, config.num_experts, config.intermediate_size))
        for name in NORMS:
            setattr(self, name, LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> torch.Tensor:
        """Returns the layer's output [1, T, D] for hidden_states [1, T, D]; passes `options` to attention."""
        hidden_states = hidden_states + self.post_attn_norm(self.attn(self.pre_attn_norm(hidden_states), **options)[0])
        output: torch.Tensor = hidden_states + self.post_moe_norm(self.moe_block(self.pre_moe_norm(hidden_states)))
        return output


class Model(Decoder):
    """Grok-1's decoder: embedding scaled by `embedding_multiplier_scale`, layers and final norm."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **options: Any) -> Any:
        """Same arguments and result as LlamaModel."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        return super().forward(inputs_embeds=inputs_embeds * self.config.embedding_multiplier_scale, **options)


class Grok1ModelForCausalLM(CausalLM):
    """Grok-1's decoder and language-model head, under the published class name; scales the logits."""

    config: Config
    config_class = Config
    layer_class = Layer
    decoder_class = Model

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Same arguments and result as LlamaForCausalLM."""
        output = super().forward(*arguments, **options)
        output.logits = output.logits * self.config.output_multiplier_scale
        return output


register_checkpoint_conversion_mapping(
    "grok-1",
    [WeightRenaming("norm.scale", "norm.weight"), *stacked("moe_block", ("linear", "linear_v"), "linear_1")],
    overwrite=True,
)
