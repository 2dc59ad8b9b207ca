"""Finds out what a model's layers keep by running a few tokens through it: no per-model code."""

from __future__ import annotations

from typing import Any

import torch

from moiety.core.experts import ModelShape
from moiety.errors import CheckpointError
from moiety.model.seam import use_backend
from moiety.model.trunk.encoder_decoder import EncoderDecoder
from moiety.router.attention import sparse
from moiety.router.attention.paged import DiscoveryBatch
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.state_layers import batched_layer, state_discovery

_STATELESS = ("moe", "mlp")  # layer types of layers that are nothing but a feed-forward block, in transformers' names


class _ZeroExperts:
    """An ExpertBackend whose experts all answer zero."""

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> _ZeroRows:
        return _ZeroRows(hidden.new_zeros(*top_k_index.shape, hidden.shape[-1]))


class _ZeroRows:
    def __init__(self, rows: torch.Tensor):
        self._rows = rows

    def result(self) -> torch.Tensor:
        return self._rows


@torch.inference_mode()
def run_once(model: Any, batch: DiscoveryBatch, cache: Any = None) -> torch.Tensor:
    """The logits [1, T, V] of the batch's tokens, routed experts answering zero; `cache` is the model's past_key_values."""
    device = next(model.parameters()).device
    tokens = len(batch.length)
    vocabulary = model.config.get_text_config().vocab_size
    first = vocabulary // 2  # some word: padding may be embedded as zeros
    with use_backend(_ZeroExperts()):
        logits: torch.Tensor = model(
            input_ids=((first + 7 * torch.arange(tokens)) % vocabulary)[None].to(device),
            position_ids=torch.arange(tokens, device=device)[None],
            use_cache=False,
            past_key_values=cache,
            moiety_batch=batch,
        ).logits
    return logits


def prepare_layers(model: Any) -> None:
    """Lets a loaded router run layers that are more than attention: see `statefinder.install` and `sparse.install`."""
    sparse.use_indexers(model)
    state_discovery.batch_state_layers(
        model, lambda cache: run_once(model, DiscoveryBatch(state_discovery.PROBE_TOKENS), cache)
    )


def discover_cache_spec(model: Any, shape: ModelShape) -> CacheSpec:
    """What each layer keeps, once `install_mixers` has seen to its states.

    Raises CheckpointError where the router cannot run a layer.
    """
    modules = [module for module in model.modules() if getattr(module, "indexer", None) is not None]
    if any(not isinstance(module.forward, sparse.SparseAttention) for module in modules):
        reason = "its layers pick the tokens that they attend to by an indexer, which the router cannot run yet"
        raise CheckpointError(f"{shape.architecture}: {reason}")
    batch = DiscoveryBatch()
    run_once(model, batch)
    states = {key: spec for mixer in batched_layer.batched_state_layers(model) for key, spec in mixer.specs.items()}
    config = model.config.get_text_config()
    if isinstance(model, EncoderDecoder):
        # Blocks of the pool hold either an output's tokens or a prompt's.
        if batch.cross.layers != batch.spec.layers:
            reason = "its decoder layers keep of a prompt's token something else than of an output's"
            raise CheckpointError(f"{shape.architecture}: {reason}, which the router cannot cache yet")
        return CacheSpec(batch.spec.layers, cross_attention=True)
    # A layer that attended came by, and mixers know theirs; what is left keeps nothing, or something of its own, and
    # running on without that would give wrong tokens in silence.
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or {}
    seen = {*batch.spec.layers, *(layer for layer, _ in states)}
    others = [layer for layer in range(config.num_hidden_layers) if layer not in seen]
    others = [layer for layer in others if not (kinds and kinds[layer] in _STATELESS)]
    if others:
        told = ", ".join(sorted({str(kinds[layer]) for layer in others})) if kinds else "another kind"
        raise CheckpointError(
            f"{shape.architecture}: {len(others)} of {config.num_hidden_layers} layers ({told}) keep neither keys and "
            f"values nor a state that the router knows of"
        )
    if not batch.spec.layers:
        raise CheckpointError(
            f"{shape.architecture}: no layer attends, and without keys and values there are no blocks"
        )
    return CacheSpec(batch.spec.layers, states)
