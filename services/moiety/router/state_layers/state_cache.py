"""The caches passed to transformers' state layers (Mamba, linear attention, convolution). Each holds one layer's states."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from moiety.errors import CheckpointError

CONVOLUTION, RECURRENT = "convolution", "recurrent"
StateName = tuple[str, int]  # kind, index among the layer's states of that kind


class LayerStates(LinearAttentionCacheLayerMixin):
    """One layer's states for the sequences of one call.

    Before the call these are the sequences' earlier states, if any; after it, the states to keep.
    """

    def __init__(self, states: dict[StateName, torch.Tensor], number_of_states: int = 1):
        super().__init__(number_of_states)
        for (kind, index), state in states.items():
            (self.conv_states if kind == CONVOLUTION else self.recurrent_states)[index] = state
            self.has_previous_state[index] = True

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Does nothing: unlike transformers' own class, this class allocates no states before the first update."""

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> torch.Tensor:
        """Returns the inputs that were kept, followed by the new ones, [B, channels, tokens]. Keeps the last of these.

        If none were kept, zeros in front fill the new inputs up to the kernel's width.
        """
        past = self.conv_states[state_idx]
        if past is not None:
            width, inputs = past.shape[-1], torch.cat((past, conv_states), dim=-1)
        else:
            width = conv_kernel_size or conv_states.shape[-1]
            inputs = functional.pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        self.conv_states[state_idx] = inputs[..., -width:]
        self.has_previous_state[state_idx] = True
        return inputs

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Keeps the recurrent states [B, ...] and returns them."""
        self.recurrent_states[state_idx] = recurrent_states
        self.has_previous_state[state_idx] = True
        return recurrent_states

    @property
    def kept(self) -> dict[StateName, torch.Tensor]:
        """The states held now, each [B, ...]."""
        both = ((CONVOLUTION, self.conv_states), (RECURRENT, self.recurrent_states))
        return {(kind, index): state for kind, states in both for index, state in states.items() if state is not None}


class _NothingKept(Cache):
    """A cache in which attention layers store nothing."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values unchanged: the attention function stores them."""
        return key_states, value_states


class PositionCache(_NothingKept):
    """A cache for an attention layer that computes a token's position as the cache's length plus the token's index."""

    def __init__(self, positions: torch.Tensor):
        """`positions`: [T], of the tokens of a packed row."""
        super().__init__(layers=[])
        self._offsets = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Returns offsets [T]: a token's offset plus its index in the row is its position."""
        return self._offsets


class StateCache(_NothingKept):
    """A transformers cache for one state layer."""

    is_croppable = False

    def __init__(self, layer: int, states: LayerStates):
        super().__init__(layers=[states])
        self.layers: dict[int, LayerStates] = {layer: states}

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether all states of the layer, or its state `state_idx`, continue from earlier tokens."""
        (layer,) = self.layers.values() if layer_idx is None else (self.layers[layer_idx],)
        return all(layer.has_previous_state.values()) if state_idx is None else layer.has_previous_state[state_idx]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        raise CheckpointError("its attention reads mask sizes from the cache, which the router does not support yet")

    # MiniMax has its own cache class, with these two methods for its recurrent state.

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self.layers[layer_idx].recurrent_states[0]

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self.layers[layer_idx].update_recurrent_state(linear_cache)
