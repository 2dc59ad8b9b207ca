"""Writes random checkpoints in the layouts that publishers ship: small for tests, by overrides large for benchmarks.

Each is a real folder: config, tokenizer, safetensors under the published tensor names, sharded and indexed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moiety.model.architecture import language_model_class, meta_model
from moiety.model.checkpoint import INDEX_FILE
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
    "switch_transformers": {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_experts": 8,
        "expert_capacity": 6,  # few enough that longer prompts overflow
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 24,
        "initializer_range": 0.5,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "nllb-moe": {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": 8,
        "moe_eval_capacity_token_fraction": 0.25,  # published: 1.0, which never overflows
        "max_position_embeddings": 512,
        "initializer_range": 0.7,
        "scale_embedding": False,  # published: True; eight times as wide, a random model says one word for ever
        "decoder_start_token_id": 2,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
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
SHARD_BYTES = 256 << 20


def write_tiny(
    architecture: str, folder: str | Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES, **overrides: Any
) -> Path:
    """Writes a checkpoint of `architecture` (a key of TINY) to `folder`, which is created; returns the folder.

    `overrides` are config values; `dtype="bfloat16"` among them sets the stored dtype. The weights depend on `seed`,
    name and shape only. At most `shard_bytes` and one tensor are in memory, so benchmark sizes can be written too.
    """
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    if architecture not in TINY:
        raise ValueError(f"architecture {architecture!r}: must be one of {', '.join(TINY)}")
    settings = {"dtype": "float32", **TINY[architecture], **overrides}
    if settings["vocab_size"] < VOCABULARY:
        raise ValueError(f"vocab_size {settings['vocab_size']}: must be at least {VOCABULARY}, the tokenizer's")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(architecture, **settings)
    model: Any = meta_model(language_model_class(config), config)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    shapes = {name: tensor.shape for name, tensor in revert_weight_conversion(model, state).items()}

    dtype = getattr(torch, settings["dtype"])
    weights = ((name, _weight(name, shape, dtype, seed, config.initializer_range)) for name, shape in shapes.items())
    _write_shards(path, weights, shard_bytes)
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    write_tokenizer(path)
    return path


def _weight(name: str, shape: torch.Size, dtype: torch.dtype, seed: int, deviation: float) -> torch.Tensor:
    """Normal noise, around one for the weights of norms and zero for all else, biases and sinks included: zeros hide mistakes."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    stored = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    noise = torch.empty(shape, dtype=stored).normal_(0.0, deviation, generator=generator)
    return noise + 1 if len(shape) == 1 and "norm" in name and not name.endswith("bias") else noise


def _write_shards(path: Path, weights: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(pending, path / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    total = 0
    for name, weight in weights:
        if pending and sum(tensor.nbytes for tensor in pending.values()) + weight.nbytes > shard_bytes:
            flush()
        pending[name] = weight
        total += weight.nbytes
    flush()

    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (path / f"shard-{number}").rename(path / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
