"""Writes random checkpoints in the layouts that publishers ship: small for tests, by overrides large for benchmarks.

Each is a real folder: config, tokenizer, safetensors under the published tensor names, sharded and indexed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moiety.model.architecture import meta_model
from moiety.model.shards import SHARD_BYTES, write_shards
from moiety.model.tiny_tokenizer import BOS, EOS, PAD, VOCABULARY, write_tokenizer

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # wide enough that greedy tokens depend on every layer
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_SPARSE: Mapping[str, Any] = {**_COMMON, "moe_intermediate_size": 40}
_LATENT: Mapping[str, Any] = {
    **_SPARSE,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
TINY: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {**_COMMON, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**_SPARSE, "num_experts": 12, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    "qwen3_moe": {**_SPARSE, "num_experts": 16, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {**_COMMON, "num_experts": 16},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "v_head_dim": 12, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, "n_group": 4, "topk_group": 2},
    "glm4_moe_lite": {**_LATENT, "n_group": 1, "topk_group": 1},
    "gpt_oss": {
        **_COMMON,
        "num_local_experts": 8,
        "head_dim": 16,
        "sliding_window": 16,
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
}


def write_tiny(
    architecture: str, folder: str | Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES, **overrides: Any
) -> Path:
    """Writes a checkpoint of `architecture` (a key of TINY) to `folder`, which is created; returns the folder.

    `overrides` are config values; `dtype="bfloat16"` among them sets the stored dtype. The weights depend on `seed`,
    name and shape only. At most `shard_bytes` and one tensor are in memory, so benchmark sizes can be written too.
    """
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if architecture not in TINY:
        raise ValueError(f"architecture {architecture!r}: must be one of {', '.join(TINY)}")
    settings = {"dtype": "float32", **TINY[architecture], **overrides}
    if settings["vocab_size"] < VOCABULARY:
        raise ValueError(f"vocab_size {settings['vocab_size']}: must be at least {VOCABULARY}, the tokenizer's")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(architecture, **settings)
    model: Any = meta_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    shapes = {name: tensor.shape for name, tensor in revert_weight_conversion(model, state).items()}

    dtype = getattr(torch, settings["dtype"])
    weights = ((name, _weight(name, shape, dtype, seed, config.initializer_range)) for name, shape in shapes.items())
    write_shards(path, weights, shard_bytes)
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    write_tokenizer(path)
    return path


def _weight(name: str, shape: torch.Size, dtype: torch.dtype, seed: int, deviation: float) -> torch.Tensor:
    """Normal noise, around one for norms and zero for all else, biases and sinks included: zeros hide mistakes."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    stored = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    noise = torch.empty(shape, dtype=stored).normal_(0.0, deviation, generator=generator)
    return noise + 1 if len(shape) == 1 and "norm" in name else noise
