"""Config values of tiny checkpoints by architecture, where the sizes by field name in `sizes.py` do not suit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LATENT: Mapping[str, Any] = {"n_routed_experts": 16, "num_experts_per_tok": 4}
_LLAMA4: Mapping[str, Any] = {
    "num_experts_per_tok": 1,
    "intermediate_size": 40,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 32,
    "no_rope_layer_interval": 4,
}
_DOTS3: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 12, "num_experts_per_tok": 4, "mlp_only_layers": [1]},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "v_head_dim": 12, "topk_method": "greedy"},
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": {**_LATENT, "n_group": 1, "topk_group": 1},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
    },
    "gemma4": {
        "text_config": {
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 16,
        }
    },
    "kimi_linear": {
        "num_experts_per_token": 3,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts_per_tok": 2,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_d_state": 16,
        "mamba_expand": 2,
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "bailing_hybrid": {"num_hidden_layers": 6, "num_key_value_heads": 4, "num_experts": 16},
    "zaya": {"num_experts_per_tok": 1},
    "phimoe": {"num_experts_per_tok": 2},
    **{name: {"num_key_value_heads": 4} for name in ("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4")},
    "mistral_large4": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 64},
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "llama4_text": _LLAMA4,
    "llama4": {"text_config": _LLAMA4},
    "longcat_flash": {
        "num_layers": 2,
        "num_key_value_heads": 4,
        "ffn_hidden_size": 96,
        "head_dim": 8,
        "moe_topk": 4,
        "n_routed_experts": 12,
        "zero_expert_num": 4,
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        }
    },
    "grok-1": {"attn_output_multiplier": 0.25, "num_experts_per_tok": 2},
    "arctic": {
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "moe_layer_frequency": 1,
        "parallel_attn_mlp_res": True,
    },
    "deepseek": {"n_routed_experts": 16, "num_experts_per_tok": 6, "n_shared_experts": 2, "num_key_value_heads": 4},
    "glam": {"num_experts_per_tok": 2},
}
