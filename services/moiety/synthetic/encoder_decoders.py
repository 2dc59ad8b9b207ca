"""Config values of tiny encoder-decoders: published values made small, and capacities that tests' prompts exceed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SWITCH: Mapping[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "expert_capacity": 6,  # published: 64, for 512 tokens
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 24,  # shorter than the tests' prompts
    "initializer_range": 0.4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
NLLB: Mapping[str, Any] = {
    "d_model": 64,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "moe_eval_capacity_token_fraction": 0.25,  # published: 1.0, which no expert can exceed
    "initializer_range": 0.5,
    "decoder_start_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
# A random decoder repeats one token if its input, or its constant prompt, outweighs what it computes. T5 does not scale its
# attention scores: it starts from narrow queries instead.
NARROW: Mapping[str, float] = {
    "Attention.q.": 0.25,
    "EncDecAttention.o.": 0.3,
    "model.shared.": 0.1,
    "cross_attention.out_proj.": 0.3,
}
