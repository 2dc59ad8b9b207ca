"""Refuses rotary positions whose rotation depends on the length of the text.

With `rope_type` longrope, transformers rotates all tokens of a call by other factors as soon as one of them lies beyond
`original_max_position_embeddings`. A step packs texts of all lengths into one call, and cached keys serve longer texts later:
each position needs one rotation. Dynamic NTK changes its factors only beyond the model's limit, where nothing is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moiety.errors import ConfigError
from moiety.model.architectures.transformers_model import causal_lm_class, load_config, meta_model
from moiety.model.checkpoint.checkpoint import Checkpoint


def check_rope(checkpoint: Checkpoint, max_context: int) -> None:
    """Raises ConfigError if rotations depend on the length of texts of up to `max_context` tokens. Reads no weights."""
    config = load_config(checkpoint)
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for rope in found.values() if all(isinstance(value, Mapping) for value in found.values()) else [found]:
        if rope.get("rope_type") != "longrope":
            continue
        limit = rope["original_max_position_embeddings"]
        if max_context > limit and _differ(checkpoint, config, limit):
            reason = "with rope_parameters.rope_type longrope, longer texts rotate every position by other factors"
            bound = f"must be at most {limit}, the checkpoint's original_max_position_embeddings: {reason}"
            raise ConfigError("max_context", max_context, bound)


def _differ(checkpoint: Checkpoint, config: Any, limit: int) -> bool:
    """Returns whether the rotation of position 1 changes beside the position `limit`, which only a longer text has.

    transformers' Phi-MoE, for one, changes nothing but a scale, which Phi-3.5-MoE publishes with one value for both.
    """
    model = meta_model(causal_lm_class(checkpoint, config), config)
    modules: list[Any] = [module for module in model.modules() if getattr(module, "rope_type", None) == "longrope"]
    for rotary in {type(module): type(module)(module.config) for module in modules}.values():
        short, long = (rotary(torch.zeros(1), torch.tensor([positions])) for positions in ([1], [1, limit]))
        pairs = zip(short, long, strict=True) if isinstance(short, tuple) else [(short, long)]
        if not all(torch.equal(one, other[..., :1, :]) for one, other in pairs):  # [1, T, width]
            return True
    return not modules  # what is not found may differ
