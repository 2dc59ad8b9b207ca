"""Interfaces of a forward pass's tokens, packed into one row, and of the cache of their sequences.

The router's attention and state layers and the trunk's encoder-decoders read them through `seam.current_batch`. StepBatch and
CrossAttentionBatch in `router/attention/step_batch.py` implement them and explain their fields and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch


class Batch(Protocol):
    """The tokens of a pass, and where attention and state layers find each token's past."""

    @property
    def positions(self) -> torch.Tensor: ...

    @property
    def tables(self) -> torch.Tensor: ...

    @property
    def sequence(self) -> torch.Tensor: ...

    @property
    def length(self) -> torch.Tensor: ...

    @property
    def cross(self) -> Prompts | None: ...

    @property
    def states(self) -> Any: ...  # StepStates of the router, or None

    def sequences(self) -> Iterator[Batch]: ...

    def store(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor | int,
        window: int | None = None,
        chunk: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class Prompts(Protocol):
    """The prompts of an encoder-decoder's sequences: which of them the pass encodes, and where all of them are cached."""

    @property
    def ids(self) -> torch.Tensor: ...

    @property
    def lengths(self) -> tuple[int, ...]: ...

    @property
    def tables(self) -> torch.Tensor: ...

    @property
    def length(self) -> torch.Tensor: ...

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def owners(self, tokens: Sequence[int]) -> list[int]: ...
