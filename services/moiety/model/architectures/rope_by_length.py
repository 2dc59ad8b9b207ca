"""The longest text that a model's rotary positions serve: as far as the rope scaling reaches with one rotation per position.

With `rope_type` longrope, transformers rotates all tokens of a call by other factors as soon as one of them lies beyond the
length that the model was first trained on. A step packs texts of all lengths into one call, and cached keys serve longer texts
later: each position needs one rotation. Dynamic NTK changes its factors beyond `max_position_embeddings`, so it ends there.
YaRN has one rotation for each position, and reaches `factor` times the length that the model was first trained on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from moiety.model.architectures.transformers_model import rope_parameters
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.rope_fields import ORIGINAL
from moiety.model.checkpoint.side_files import CONFIG_FILE, text_config, warn


def served_context(checkpoint: Checkpoint, config: Any, model: Any, stated: int) -> int:
    """Returns the most tokens of a text, where the config's own length is `stated`. `model` is on `meta`; reads no weights.

    Warns if that is less than `stated`.
    """
    context = _reached(checkpoint, config, model, stated)
    if context < stated:
        warn(
            f"checkpoint {checkpoint.path}: texts of up to {context} tokens are served, though {CONFIG_FILE} states {stated}: "
            "so far its rope scaling reaches with one rotation for each position"
        )
    return context


def _reached(checkpoint: Checkpoint, config: Any, model: Any, stated: int) -> int:
    """Returns how many tokens a text may have, without a warning."""
    ropes = rope_parameters(config)
    if _states_original(checkpoint):  # else transformers takes `stated` for it, which may be extended already
        reaches = [int(rope["factor"] * rope[ORIGINAL]) for rope in ropes if _extends(rope, stated)]
        stated = min(reaches, default=stated)
    if not any(rope.get("rope_type") == "longrope" for rope in ropes):
        return stated
    # What the rotary modules compute decides. Config fields do not: transformers reads them from several places.
    rotations = [rotation for module in model.modules() for rotation in _longropes(module)]
    if not rotations:  # what is not found may change
        return min(stated, *(int(rope.get(ORIGINAL) or 1) for rope in ropes if rope.get("rope_type") == "longrope"))
    lengths = range(2, stated + 1)
    return 1 + bisect_left(lengths, True, key=lambda length: any(_changes(one, length) for one in rotations))


def _extends(rope: dict[str, Any], stated: int) -> bool:
    """Returns whether a rope says by which factor it extends which length, no longer than the config's own."""
    scaled = rope.get("rope_type") in ("yarn", "longrope") and bool(rope.get("factor"))
    return scaled and 0 < (rope.get(ORIGINAL) or 0) <= stated


def _states_original(checkpoint: Checkpoint) -> bool:
    """Returns whether config.json states the length that the model was first trained on, at the top or with the rope."""
    text = text_config(checkpoint.config)
    ropes = [text.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    kinds = [kind for rope in ropes for kind in rope.values() if isinstance(kind, dict)]
    return any(ORIGINAL in part for part in (text, *ropes, *kinds))


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
