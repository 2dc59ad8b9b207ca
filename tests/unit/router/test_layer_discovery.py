"""Layer discovery finds what a model's layers cache per token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.model.trunk.read import load_trunk
from moiety.router.attention import paged
from moiety.router.cache.cache_spec import CacheSpec
from moiety.router.layer_discovery import discover_cache_spec


def spec_of(folder: str | Path) -> CacheSpec:
    """Returns the CacheSpec of a checkpoint's trunk."""
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    return discover_cache_spec(load_trunk(checkpoint, layout, torch.float32, attention=paged.NAME), layout.shape)


def test_keys_and_values_may_differ_in_width(tiny: Callable[[str], str]):
    """DeepSeek-V3's expanded latent attention has 4 heads with keys of 24 and values of 16 elements in each of 4 layers."""
    spec = spec_of(tiny("deepseek_v3"))
    assert {(layer.heads, layer.key_width, layer.value_width) for layer in spec.layers.values()} == {(4, 24, 16)}
    assert sorted(spec.layers) == [0, 1, 2, 3]
    assert spec.bytes_per_token == 4 * 4 * (24 + 16) * 4
