"""Small values for the config fields of any architecture, by field name; `families.py` overrides them by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moiety.synthetic.tokenizer import BOS, EOS, PAD, VOCABULARY

COUNT_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.15,  # wide enough that greedy tokens depend on every layer
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "sliding_window": 16,
    # experts
    **dict.fromkeys(COUNT_OF_EXPERTS, 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 3),
    "moe_intermediate_size": 40,
    "expert_ffn_hidden_size": 40,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "shared_experts_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "dense_intermediate_size": 96,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 4,
    "topk_group": 2,
    # latent attention and its indexer
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 16,
    # recurrent layers
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "use_mamba_kernels": False,
}
TOWER: Mapping[str, Any] = {  # of a multimodal checkpoint: published and therefore written, but not loaded or run
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 16,
    "out_hidden_size": 64,
}


def sized(config_class: Any, settings: Mapping[str, Any], sizes: Mapping[str, Any] = SIZES) -> dict[str, Any]:
    """Returns values for a config of `config_class`: `settings`, and a small size for every other field that `sizes` lists.

    A multimodal config is sized part by part: its text config with SIZES, its other configs with TOWER.
    """
    defaults = {field.name: field.default for field in fields(config_class)}
    if defaults.get("sliding_window") is None:  # published checkpoints have no window, so the tiny one has none
        defaults.pop("sliding_window", None)
    parts = {name: part for name, part in (config_class.sub_configs or {}).items() if hasattr(part, "model_type")}
    if "text_config" in parts:
        sizes = {name: sizes[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name, part in parts.items():
            given = settings.get(name, {})
            settings = {**settings, name: sized(part, given, SIZES if name == "text_config" else TOWER)}
    if "kv_lora_rank" in defaults:  # latent attention expands keys and values for every head
        sizes = {**sizes, "num_key_value_heads": sizes["num_attention_heads"]}
    return {**{name: value for name, value in sizes.items() if name in defaults}, **settings}
