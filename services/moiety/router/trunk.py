"""The one list of what is done to a loaded trunk before it runs steps. Serving, parity and tests prepare it here."""

from __future__ import annotations

import torch
from torch import nn

from moiety.core.experts import ModelShape
from moiety.model.trunk.cpu_layers import use_cpu_kernels
from moiety.model.trunk.fixed_elementwise import fix_elementwise
from moiety.model.trunk.gate_scores import record_gate_scores
from moiety.model.trunk.shared_expert_overlap import overlap_shared_experts
from moiety.router.attention.cross import use_cross_attention
from moiety.router.attention.latent import cache_latents
from moiety.router.attention.paged import DiscoveryBatch
from moiety.router.attention.sparse import use_indexers
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.layer_discovery import discover_cache_spec, run_once
from moiety.router.state_layers.state_discovery import PROBE_TOKENS, batch_state_layers


def prepare_trunk(
    model: nn.Module, shape: ModelShape, *, deterministic: bool = False, may_overflow: bool = False
) -> CacheSpec:
    """Prepares a trunk, loaded with attention `paged.NAME`, for packed steps; returns what its layers cache. Call once.

    `deterministic` and `may_overflow` are the router's settings of these names. Raises CheckpointError where the router
    cannot run a layer, and ConfigError where the gates do not allow overflow.
    """

    def run() -> torch.Tensor:
        return run_once(model, DiscoveryBatch())

    # First weights and arithmetic: latents are views of the final weights, and later passes compare results.
    use_cpu_kernels(model, deterministic=deterministic)
    if deterministic:
        fix_elementwise(model)
    # Then attention: the model runs on a batch only after all its attention layers read from one.
    cache_latents(model, deterministic=deterministic)
    use_cross_attention(model)
    use_indexers(model)
    # Then what runs the model. State layers come before `discover_cache_spec`, which refuses layers that keep nothing it knows.
    batch_state_layers(model, lambda cache: run_once(model, DiscoveryBatch(PROBE_TOKENS), cache))
    spec = discover_cache_spec(model, shape)
    if may_overflow:
        record_gate_scores(model, shape, run)
    # Last, because it compares the bits of two runs of the model: a later change would not be compared.
    overlap_shared_experts(model, run)
    return spec
