"""What a model's layers keep of a token, and how long, and what of a sequence: the accounting behind blocks and slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch

from moiety_kernels.reference.attention import first_visible


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
class StateSpec:
    """A tensor that a layer keeps of a sequence, of one size however long that is."""

    kind: str  # for people: "recurrent", "convolution", ...
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_slot(self) -> int:
        """Of both places it has: one is for the step that is not done yet."""
        return 2 * prod(self.shape) * self.dtype.itemsize


StateKey = tuple[int, str]  # layer index, and which of its states


def indexer_of(layer: int) -> int:
    """The index in a CacheSpec of what a layer's indexer keeps of a token, beside what its attention keeps."""
    return ~layer


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Layer index -> what it keeps of a token; (layer index, name) -> what it keeps of a sequence."""

    layers: Mapping[int, LayerSpec]
    states: Mapping[StateKey, StateSpec] = field(default_factory=dict)
    cross_attention: bool = (
        False  # prompts are an encoder's: their tokens lie in blocks of their own, and outputs follow from them
    )

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.layers.values())

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of a running sequence's states, both copies of those that change."""
        return sum(state.bytes_per_slot for state in self.states.values())

    @property
    def indexed(self) -> bool:
        """Whether there are layers that attend to what an indexer picks."""
        return any(layer < 0 for layer in self.layers)

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
