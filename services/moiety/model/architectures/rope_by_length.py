"""Refuses rotary positions whose rotation depends on the length of the text.

With `rope_type` longrope, transformers rotates all tokens of a call by other factors as soon as one of them lies beyond the
length that the model was first trained on. A step packs texts of all lengths into one call, and cached keys serve longer texts
later: each position needs one rotation. Dynamic NTK changes its factors only beyond the model's limit, where nothing is served.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from moiety.errors import ConfigError
from moiety.model.architectures.transformers_model import causal_lm_class, load_config, meta_model, rope_parameters
from moiety.model.checkpoint.checkpoint import Checkpoint


def check_rope(checkpoint: Checkpoint, max_context: int) -> None:
    """Raises ConfigError if rotations depend on the length of texts of up to `max_context` tokens. Reads no weights.

    What the rotary modules compute decides. Config fields do not: transformers reads them from several places.
    """
    config = load_config(checkpoint)
    ropes = [rope for rope in rope_parameters(config) if rope.get("rope_type") == "longrope"]
    if not ropes:
        return
    model = meta_model(causal_lm_class(checkpoint, config), config)
    rotations = [rotation for module in model.modules() for rotation in _longropes(module)]
    lengths = range(2, max_context + 1)
    limit = 1 + bisect_left(lengths, True, key=lambda length: any(_changes(one, length) for one in rotations))
    if not rotations:  # what is not found may change
        limit = min(int(rope.get("original_max_position_embeddings") or 1) for rope in ropes)
    if limit < max_context:
        reason = "with rope_parameters.rope_type longrope, longer texts rotate every position by other factors"
        bound = f"must be at most {limit}, the checkpoint's original_max_position_embeddings: {reason}"
        raise ConfigError("max_context", max_context, bound)


def _longropes(module: Any) -> Iterator[Callable[[torch.Tensor, torch.Tensor], Any]]:
    """Yields the longrope rotations of a module on `meta`, on the CPU; some modules have one for each kind of layer."""
    kind = getattr(module, "rope_type", None)
    if kind == "longrope":
        yield type(module)(module.config)
    elif isinstance(kind, dict) and "longrope" in kind.values():
        rotary = type(module)(module.config)
        yield from (partial(rotary, layer_type=layer) for layer, name in kind.items() if name == "longrope")


def _changes(rotation: Callable[[torch.Tensor, torch.Tensor], Any], length: int) -> bool:
    """Returns whether position 0 or 1 rotates otherwise in a text of `length` tokens than alone.

    transformers' Phi-MoE, for one, changes nothing but a scale, which Phi-3.5-MoE publishes with one value for both.
    """
    short, long = (rotation(torch.zeros(1), torch.tensor([positions])) for positions in ([0, 1], [0, 1, length - 1]))
    pairs = zip(short, long, strict=True) if isinstance(short, tuple) else [(short, long)]
    return not all(torch.equal(one, other[..., :2, :]) for one, other in pairs)  # [1, T, width]
