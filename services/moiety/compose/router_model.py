"""Loads what a router computes with: the trunk, and the cache for its keys, values and states."""

from __future__ import annotations

import logging
import time

import torch

from moiety.config.services import RouterSettings
from moiety.errors import ConfigError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.layout import ExpertLayout
from moiety.model.trunk.read import load_trunk
from moiety.router.attention import paged
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.cache.kv_cache import KVCache
from moiety.router.trunk import prepare_trunk
from moiety_kernels.threads import usable_cores

_log = logging.getLogger(__name__)


def threads_of(settings: RouterSettings) -> int:
    """Returns how many threads the router computes with."""
    return settings.threads or usable_cores()


def load_model(
    settings: RouterSettings, checkpoint: Checkpoint, layout: ExpertLayout, dtype: torch.dtype, revision: str
) -> tuple[torch.nn.Module, KVCache]:
    """Loads the trunk and creates the KV cache. Raises ConfigError or CheckpointError if the router cannot run the model."""
    torch.set_num_threads(threads_of(settings))
    began = time.monotonic()
    model = load_trunk(checkpoint, layout, dtype, settings.device, paged.NAME)
    deterministic, may_overflow = settings.deterministic, settings.may_overflow
    spec = prepare_trunk(model, layout.shape, deterministic=deterministic, may_overflow=may_overflow)
    cache = _cache(settings, spec, revision)
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    _log.info(
        "trunk weights %.1f MiB, read in %.2f s; KV cache of %.1f MiB: %d blocks of %d tokens of %d bytes%s",
        weights / 2**20,
        time.monotonic() - began,
        settings.kv_memory / 2**20,
        cache.blocks,
        cache.block_tokens,
        spec.bytes_per_token,
        f", states of {spec.bytes_per_slot} bytes in {settings.slots} slots; prefixes are not reused"
        if spec.states
        else "",
    )
    return model, cache


def _cache(settings: RouterSettings, spec: CacheSpec, revision: str) -> KVCache:
    """Creates a KV cache of `kv_memory` bytes.

    Raises ConfigError if `kv_memory` is too small or more than there is, or for a setting that the model's kind of cache
    does not allow.
    """
    if spec.states and settings.speculative_tokens:
        bound = "must be 0 for this model: its layers keep states, which cannot be undone after a wrong draft"
        raise ConfigError("speculative_tokens", settings.speculative_tokens, bound)
    if (spec.states or spec.indexed) and settings.deterministic:
        what = "states" if spec.states else "an indexer's picks"
        bound = f"must be false for this model: the bits of {what} in its layers depend on where prompts are split into steps"
        raise ConfigError("deterministic", settings.deterministic, bound)
    try:
        cache = KVCache(
            spec,
            int(settings.kv_memory),
            torch.device(settings.device),
            slots=settings.slots,
            block_tokens=settings.block_tokens,
            revision=revision if settings.prefix_cache else None,
        )
    except (RuntimeError, MemoryError) as error:
        # For a CPU's memory torch raises the bare class. A GPU's may be free again at the next start.
        if isinstance(error, RuntimeError) and (type(error) is not RuntimeError or "allocate" not in str(error)):
            raise
        bound = f"must be less: {settings.device} cannot allocate so much"
        raise ConfigError("kv_memory", settings.kv_memory.human_readable(), bound) from error
    if cache.blocks == 0:
        least = settings.slots * spec.bytes_per_slot + spec.bytes_per_token * settings.block_tokens
        states = f"{settings.slots} slots of states and " if spec.states else ""
        raise ConfigError(
            "kv_memory",
            int(settings.kv_memory),
            f"must be at least {least} bytes, for {states}one block of the KV cache",
        )
    return cache


def max_context_of(settings: RouterSettings, model_limit: int) -> int:
    """Returns the most tokens per sequence. Raises ConfigError if the setting is above `model_limit`."""
    if settings.max_context is None:
        return model_limit
    if settings.max_context > model_limit:
        raise ConfigError(
            "max_context",
            settings.max_context,
            f"must be at most {model_limit}, the model's limit by its length and rope scaling",
        )
    return settings.max_context
