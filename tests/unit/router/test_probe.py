"""What a model's layers keep per token is found out by looking, and what cannot be kept is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moiety.model.checkpoint import Checkpoint
from moiety.model.layout import expert_layout
from moiety.model.router import load_router
from moiety.router import attention
from moiety.router.cachespec import CacheSpec
from moiety.router.probe import cache_spec


def spec_of(folder: str | Path) -> CacheSpec:
    """The CacheSpec of a checkpoint's router."""
    attention.register()
    checkpoint = Checkpoint.open(folder)
    layout = expert_layout(checkpoint)
    return cache_spec(load_router(checkpoint, layout, torch.float32, attention=attention.NAME), layout.shape)


def test_keys_and_values_may_differ_in_width(tiny: Callable[[str], str]):
    """DeepSeek-V3's expanded latent attention: 4 heads with keys of 24 and values of 16 elements, in each of 4 layers."""
    spec = spec_of(tiny("deepseek_v3"))
    assert {(layer.heads, layer.key_width, layer.value_width) for layer in spec.layers.values()} == {(4, 24, 16)}
    assert sorted(spec.layers) == [0, 1, 2, 3]
    assert spec.bytes_per_token == 4 * 4 * (24 + 16) * 4
