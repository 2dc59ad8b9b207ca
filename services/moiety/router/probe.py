"""Finds out what a model's attention layers keep per token by running one token through it: no per-model code."""

from __future__ import annotations

from typing import Any

import torch

from moiety.core import ModelShape
from moiety.errors import CheckpointError
from moiety.model.encoderdecoder import EncoderDecoder
from moiety.model.seam import use_backend
from moiety.router.attention import ProbeBatch
from moiety.router.cachespec import CacheSpec


class _ZeroExperts:
    """An ExpertBackend whose experts all answer zero."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> _ZeroRows:
        return _ZeroRows(hidden.new_zeros(*top_k_index.shape, hidden.shape[-1]))

    def while_waiting(self, layer: int) -> None: ...


class _ZeroRows:
    def __init__(self, rows: torch.Tensor):
        self._rows = rows

    def result(self) -> torch.Tensor:
        return self._rows


@torch.inference_mode()
def run_once(model: Any, batch: ProbeBatch) -> torch.Tensor:
    """The logits [1, 1, V] of one token, its routed experts answering zero."""
    device = next(model.parameters()).device
    token = _some_word(model)
    with use_backend(_ZeroExperts()):
        logits: torch.Tensor = model(
            input_ids=torch.tensor([[token]], device=device),
            position_ids=torch.zeros(1, 1, dtype=torch.long, device=device),
            use_cache=False,
            moiety_batch=batch,
        ).logits
    return logits


def _some_word(model: Any) -> int:
    """A token that is no padding, which may be embedded as zeros."""
    return int(model.config.get_text_config().vocab_size // 2)


def cache_spec(model: Any, shape: ModelShape) -> CacheSpec:
    """What each layer keeps. Raises CheckpointError where the router's attention cannot run a layer."""
    if any(getattr(module, "indexer", None) is not None for module in model.modules()):
        reason = "its layers pick the tokens that they attend to by an indexer, which the router cannot run yet"
        raise CheckpointError(f"{shape.architecture}: {reason}")
    batch = ProbeBatch(_some_word(model))
    run_once(model, batch)
    config = model.config.get_text_config()
    if isinstance(model, EncoderDecoder):
        # Blocks of the pool hold either an output's tokens or a prompt's.
        if batch.across.layers != batch.spec.layers:
            reason = "its decoder layers keep of a prompt's token something else than of an output's"
            raise CheckpointError(f"{shape.architecture}: {reason}, which the router cannot cache yet")
        return batch.spec
    # A layer that attended came by; one that did not (Mamba, linear attention, convolution) has a state of its own, and
    # running on without it would give wrong tokens in silence.
    others = sorted(set(range(config.num_hidden_layers)) - batch.spec.layers.keys())
    if others:
        kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or {}
        told = ", ".join(sorted({str(kinds[layer]) for layer in others})) if kinds else "another kind"
        raise CheckpointError(
            f"{shape.architecture}: {len(others)} of {config.num_hidden_layers} layers ({told}) keep a state that is no "
            f"keys and values, which the router cannot cache yet"
        )
    return batch.spec
