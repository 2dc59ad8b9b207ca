"""A GLaM-style decoder (arXiv:2112.06905), built from its description: no checkpoint of GLaM was published.

Every second layer has a MoE: GShard's top-2 gate (softmax, the two weights normalised; arXiv:2006.16668) and experts of
two matrices. The layers between them have a gated GELU MLP. Capacity is not limited, as in GLaM's inference. Unlike
GLaM, positions are rotary instead of per-layer relative biases, and there are no biases. Tensor names: Llama's,
`mlp.gate.weight`, `mlp.experts.N.{up,down}_proj.weight`.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from moiety.model.architectures.definitions.parts import CausalLM, Gate, MoE, PlainExperts, stacked


class Config(LlamaConfig):
    """GLaM's config: activation, experts and MoE layers as in GLaM 1.7B/64E; all other defaults are Llama's."""

    model_type = "glam"

    hidden_act: str = "gelu"
    num_experts: int = 64
    num_experts_per_tok: int = 2
    moe_layer_frequency: int = 2


class Layer(LlamaDecoderLayer):
    """A Llama layer; if (index + 1) % `moe_layer_frequency` == 0, it has a MoE block in place of its MLP."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        if (index + 1) % config.moe_layer_frequency == 0:
            gate = Gate(config.hidden_size, config.num_experts, config.num_experts_per_tok, normalise=True)
            self.mlp = MoE(gate, PlainExperts(config, config.num_experts, config.intermediate_size))


class GlamForCausalLM(CausalLM):
    """A GLaM-style causal language model."""

    config: Config
    config_class = Config
    layer_class = Layer


register_checkpoint_conversion_mapping("glam", stacked("mlp", ("up_proj",), "down_proj"), overwrite=True)
