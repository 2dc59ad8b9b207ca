"""What a model's attention layers keep of a token, and how long: the accounting behind the block pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moiety_kernels.attention_reference import first_visible


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer keeps of a token. K and V may differ in width."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    shared: bool = False  # values are the first `value_width` columns of the keys: a latent, stored once
    window: int | None = None  # tokens that a token sees, itself among them; None = all before it
    chunk: int | None = None  # a token sees what is in its own chunk of so many tokens

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_width + (0 if self.shared else self.value_width)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Layer index -> what it keeps."""

    layers: Mapping[int, LayerSpec]

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.layers.values())

    @property
    def reach(self) -> int | None:
        """The most tokens that any layer sees behind a token; None where one sees everything.

        One layer without a window keeps the blocks of all of them: a block holds the same tokens in every layer.
        """
        reaches = [layer.window or layer.chunk for layer in self.layers.values()]
        return None if None in reaches else max(filter(None, reaches), default=None)

    def first_needed(self, position: int) -> int:
        """The oldest position that the token at `position`, or one behind it, sees in any layer."""
        return min(first_visible(position + 1, *kind) for kind in {(s.window, s.chunk) for s in self.layers.values()})
