"""What layers cache per token and per sequence, and how far back they see. The sizes of blocks and slots follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from moiety_kernels.reference.attention import first_visible


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention layer caches per token. K and V may differ in width."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    shared: bool = False  # values are the first `value_width` key columns: a latent, stored once
    window: int | None = None  # tokens that a token sees, including itself; None = all before it
    chunk: int | None = None  # a token sees only tokens of its own chunk, of this many tokens

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_width + (0 if self.shared else self.value_width)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A tensor that a layer keeps per sequence. Its size does not depend on the sequence's length."""

    kind: str  # for display: "recurrent", "convolution", ...
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of both rows of a state: the committed one, and the one that the current step writes."""
        return 2 * prod(self.shape) * self.dtype.itemsize


StateKey = tuple[int, str]  # layer index, name of the state


def indexer_of(layer: int) -> int:
    """Returns the key of a layer's indexer in `CacheSpec.layers`: negative, because the layers themselves have keys from 0."""
    return ~layer


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What all layers cache: per token by layer index, and per sequence by (layer index, name)."""

    layers: Mapping[int, LayerSpec]
    states: Mapping[StateKey, StateSpec] = field(default_factory=dict)
    cross_attention: bool = False  # an encoder reads the prompts, and their tokens have blocks of their own

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.layers.values())

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of all states of one sequence: two rows for each state."""
        return sum(state.bytes_per_slot for state in self.states.values())

    @property
    def indexed(self) -> bool:
        """Whether some layers attend to tokens that an indexer picks."""
        return any(layer < 0 for layer in self.layers)

    @property
    def reach(self) -> int | None:
        """The largest window or chunk of any layer, in tokens; None if some layer has neither.

        A block holds the same tokens in every layer, so one layer that sees everything keeps all of a sequence's blocks.
        """
        reaches = [layer.window or layer.chunk for layer in self.layers.values()]
        return None if None in reaches else max(filter(None, reaches), default=None)

    def first_needed(self, position: int) -> int:
        """Returns the oldest position that the token at `position`, or any later token, sees in any layer."""
        return min(first_visible(position + 1, *kind) for kind in {(s.window, s.chunk) for s in self.layers.values()})
