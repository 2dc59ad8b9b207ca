"""Writes a random checkpoint as its publisher would: config, tokenizer and indexed safetensors shards, with the published
tensor names.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moiety.model.architectures.definitions import definition_of
from moiety.model.architectures.transformers_model import meta_model, text_class
from moiety.model.checkpoint.shards import SHARD_BYTES, write_shards
from moiety.synthetic.catalogue import tiny_model
from moiety.synthetic.sizes import sized
from moiety.synthetic.tokenizer import VOCABULARY, write_chat_tokenizer


def write_tiny(
    architecture: str,
    folder: str | Path,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    chat: bool = False,
    **overrides: Any,
) -> Path:
    """Writes the checkpoint that `tiny_model(architecture)` describes to `folder`, which it creates; returns the folder.

    `overrides` are config values; `dtype="bfloat16"` also sets the stored dtype. A tensor's noise is seeded by `seed`
    and its name. `chat`: with the tokenizer and chat template of a chat model with tools, see `write_chat_tokenizer`;
    decoders only. At most `shard_bytes` and one tensor are in memory, so large benchmark checkpoints can be written,
    too.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tiny = tiny_model(architecture)
    config = tiny_config(tiny.architecture, {**tiny.settings, **overrides})
    if config.get_text_config().vocab_size < VOCABULARY:
        size = config.get_text_config().vocab_size
        raise ValueError(f"vocab_size {size}: must be at least {VOCABULARY}, the tokenizer's vocabulary")
    if chat and config.is_encoder_decoder:
        raise ValueError(f"{architecture}: an encoder-decoder does not chat")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model: Any = meta_model(published_class(config), config)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    shapes = {name: tensor.shape for name, tensor in revert_weight_conversion(model, state).items()}

    dtype, deviation = getattr(torch, overrides.get("dtype", "float32")), config.get_text_config().initializer_range

    def deviation_of(name: str) -> float:
        return deviation * math.prod(factor for part, factor in tiny.noise_factors.items() if part in name)

    weights = ((name, _weight(name, shape, dtype, seed, deviation_of(name))) for name, shape in shapes.items())
    stored = (
        pair for name, weight in weights for pair in (tiny.store(name, weight) if tiny.store else ((name, weight),))
    )
    write_shards(path, stored, shard_bytes)
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    if tiny.config_fields:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **tiny.config_fields}, indent=2))
    (write_chat_tokenizer if chat else tiny.tokenizer)(path)
    return path


def tiny_config(architecture: str, settings: Mapping[str, Any]) -> Any:
    """Makes the config of a tiny checkpoint: `settings`, and a small size for every other field that `sizes.py` lists."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    defined = definition_of(architecture)
    config_class = CONFIG_MAPPING[architecture] if defined is None else defined.config_class
    return config_class(**sized(config_class, {"dtype": "float32", **settings}))


def published_class(config: Any) -> Any:
    """Returns the class whose weights a publisher ships; for a multimodal architecture it includes all towers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None) or text_class(config)
    if found is None:
        raise ValueError(f"{config.model_type}: transformers has no class that generates text from it")
    return found


def _weight(name: str, shape: torch.Size, dtype: torch.dtype, seed: int, deviation: float) -> torch.Tensor:
    """Returns normal noise: around one for norms' weights, else around zero. Biases and sinks of zero would hide errors."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    stored = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    noise = torch.empty(shape, dtype=stored).normal_(0.0, deviation, generator=generator)
    return noise + 1 if len(shape) == 1 and "norm" in name and not name.endswith("bias") else noise
