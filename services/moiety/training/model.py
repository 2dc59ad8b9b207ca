"""The models that are trained: the Mixture-of-Experts, and its dense twin with as many active parameters a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moiety.training.routing import prepare


@dataclass(frozen=True, slots=True)
class Sizes:
    """The shape of a model. Without experts (`experts` 0), its layers have an MLP as wide as `top_k` experts together."""

    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 16
    top_k: int = 2
    expert_width: int = 112
    context: int = 1024

    def config(self) -> Qwen3MoeConfig:
        """Returns the published configuration of such a model."""
        return Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.expert_width,
            intermediate_size=self.top_k * self.expert_width,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            max_position_embeddings=self.context,
            rope_theta=10_000.0,
            bos_token_id=None,
            eos_token_id=0,
        )


def build(sizes: Sizes, seed: int, capacity_factor: float | None) -> Qwen3MoeForCausalLM:
    """Returns a model with random float32 weights, ready to be trained; `capacity_factor` None = no choice is dropped."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(sizes.config(), attn_implementation="sdpa", dtype=torch.float32)
    if sizes.experts:
        prepare(model, capacity_factor)
    return model
