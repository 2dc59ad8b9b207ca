"""What transformers' state layers (Mamba, linear attention, convolution) are handed as their cache: one layer's states."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from moiety.errors import CheckpointError

CONVOLUTION, RECURRENT = "convolution", "recurrent"
StateName = tuple[str, int]  # kind, and which of a layer's states of that kind


class LayerStates(LinearAttentionCacheLayerMixin):
    """The states of the sequences in one call: those given, or none yet, and behind the call those to be kept."""

    def __init__(self, states: dict[StateName, torch.Tensor], number_of_states: int = 1):
        super().__init__(number_of_states)
        for (kind, index), state in states.items():
            (self.conv_states if kind == CONVOLUTION else self.recurrent_states)[index] = state
            self.has_previous_state[index] = True

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing has to be prepared."""

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> torch.Tensor:
        """[B, channels, tokens] -> what the convolution is to see: the last inputs before them, if any, in front."""
        past = self.conv_states[state_idx]
        if past is not None:
            width, seen = past.shape[-1], torch.cat((past, conv_states), dim=-1)
        else:
            width = conv_kernel_size or conv_states.shape[-1]
            seen = functional.pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        self.conv_states[state_idx] = seen[..., -width:]
        self.has_previous_state[state_idx] = True
        return seen

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """[B, ...]"""
        self.recurrent_states[state_idx] = recurrent_states
        self.has_previous_state[state_idx] = True
        return recurrent_states

    @property
    def kept(self) -> dict[StateName, torch.Tensor]:
        """What is there now, each [B, ...]."""
        both = ((CONVOLUTION, self.conv_states), (RECURRENT, self.recurrent_states))
        return {(kind, index): state for kind, states in both for index, state in states.items() if state is not None}


class _NothingKept(Cache):
    """Attention layers that are handed it keep nothing in it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they are: the attention function keeps them."""
        return key_states, value_states


class PositionCache(_NothingKept):
    """What an attention layer is handed that asks its cache where tokens are: it counts its own from there on."""

    def __init__(self, positions: torch.Tensor):
        """`positions` [T] of the tokens of a packed row."""
        super().__init__(layers=[])
        self._before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """For each token how many come before the row's first, were the row all its sequence's: [T]."""
        return self._before


class StateCache(_NothingKept):
    """A transformers cache of one state layer."""

    is_croppable = False

    def __init__(self, layer: int, states: LayerStates):
        super().__init__(layers=[states])
        self.layers: dict[int, LayerStates] = {layer: states}

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the layer, or this state of it, goes on behind earlier tokens."""
        (layer,) = self.layers.values() if layer_idx is None else (self.layers[layer_idx],)
        return all(layer.has_previous_state.values()) if state_idx is None else layer.has_previous_state[state_idx]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        raise CheckpointError("its attention asks the cache which tokens it sees, which the router cannot tell it yet")

    # MiniMax has a cache class of its own, with these two: its state is a recurrent one.

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self.layers[layer_idx].recurrent_states[0]

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self.layers[layer_idx].update_recurrent_state(linear_cache)
