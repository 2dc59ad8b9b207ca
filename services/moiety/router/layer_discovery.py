"""Finds out what a model's layers cache by running a few tokens through it, so that no model needs code of its own."""

from __future__ import annotations

from typing import Any

import torch

from moiety.core.expert_backend import ComputedRows
from moiety.core.experts import ModelShape
from moiety.errors import CheckpointError
from moiety.model.seam import forward_context
from moiety.model.trunk.encoder_decoder import EncoderDecoder
from moiety.router.attention import sparse
from moiety.router.attention.paged import DiscoveryBatch
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.state_layers.batched_layer import batched_state_layers

_STATELESS = ("moe", "mlp")  # transformers' layer types for layers with only a feed-forward block


class _ZeroExperts:
    """An ExpertBackend whose experts all return zeros."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> ComputedRows:
        return ComputedRows(hidden.new_zeros(*top_k_index.shape, hidden.shape[-1]))


@torch.inference_mode()
def run_once(model: Any, batch: DiscoveryBatch, cache: Any = None) -> torch.Tensor:
    """Runs `model` on `batch`, with routed experts that return zeros and past_key_values=`cache`. Returns logits [1, T, V]."""
    device = next(model.parameters()).device
    tokens = len(batch.length)
    vocabulary = model.config.get_text_config().vocab_size
    first = vocabulary // 2  # not a padding token, which may be embedded as zeros
    with forward_context(_ZeroExperts(), batch):
        logits: torch.Tensor = model(
            input_ids=((first + 7 * torch.arange(tokens)) % vocabulary)[None].to(device),
            position_ids=batch.positions[None].to(device),
            use_cache=False,
            past_key_values=cache,
        ).logits
    return logits


def discover_cache_spec(model: Any, shape: ModelShape) -> CacheSpec:
    """Returns what each layer of a trunk caches. Its layers must be prepared: see `trunk.py`.

    Raises CheckpointError where the router cannot run a layer.
    """
    modules = [module for module in model.modules() if getattr(module, "indexer", None) is not None]
    if any(not isinstance(module.forward, sparse.SparseAttention) for module in modules):
        reason = "its layers attend to tokens that an indexer of an unsupported kind picks"
        raise CheckpointError(f"{shape.architecture}: {reason}")
    batch = DiscoveryBatch()
    run_once(model, batch)
    states = {key: spec for layer in batched_state_layers(model) for key, spec in layer.specs.items()}
    config = model.config.get_text_config()
    if isinstance(model, EncoderDecoder):
        # Output tokens and prompt tokens share one pool, so their blocks must have the same shape.
        if batch.cross.layers != batch.layers:
            reason = "its decoder layers cache prompt tokens in another shape than output tokens"
            raise CheckpointError(f"{shape.architecture}: {reason}, which the router cannot do yet")
        return CacheSpec(batch.layers, cross_attention=True)
    # The run has recorded each attention layer, and each state layer knows its states. Any other layer keeps nothing or
    # something unknown. Without what it keeps, it would give wrong tokens with no error.
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or {}
    seen = {*batch.layers, *(layer for layer, _ in states)}
    unknown = [layer for layer in range(config.num_hidden_layers) if layer not in seen]
    unknown = [layer for layer in unknown if not (kinds and kinds[layer] in _STATELESS)]
    if unknown:
        listed = ", ".join(sorted({str(kinds[layer]) for layer in unknown})) if kinds else "of unknown type"
        raise CheckpointError(
            f"{shape.architecture}: {len(unknown)} of {config.num_hidden_layers} layers ({listed}) keep neither keys "
            f"and values nor a state that the router supports"
        )
    if not batch.layers:
        raise CheckpointError(
            f"{shape.architecture}: no layer has attention, and the router needs keys and values to cache in blocks"
        )
    return CacheSpec(batch.layers, states)
