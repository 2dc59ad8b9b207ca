"""Interfaces of a batch: the tokens of one forward pass of a router, packed into one row, and the cache of their sequences.

Attention, state layers and encoder-decoders read it through `seam.current_batch`. `router/attention/step_batch.py` implements
both interfaces.

Shape legend: T tokens of the row, S sequences, M blocks of the longest table, E tokens of all prompts to encode, G key/value
heads, Dk and Dv head widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch


class Batch(Protocol):
    """The T tokens of a forward pass, and where attention and state layers find each token's past."""

    @property
    def positions(self) -> torch.Tensor:
        """Each token's position in its sequence, int64 [T]."""
        ...

    @property
    def tables(self) -> torch.Tensor:
        """The block ids of each sequence, int32 [S, M]."""
        ...

    @property
    def sequence(self) -> torch.Tensor:
        """The row of `tables` that belongs to each token, int32 [T], on the host."""
        ...

    @property
    def length(self) -> torch.Tensor:
        """The number of positions up to and including each token, int32 [T], on the host."""
        ...

    @property
    def cross(self) -> Prompts | None:
        """The prompts of the sequences, if the model is an encoder-decoder."""
        ...

    @property
    def states(self) -> Any:
        """Which states the tokens update: a `StepStates` of the router; None in a model or a trial run without states."""
        ...

    def sequences(self) -> Iterator[Batch]:
        """Yields a batch of each sequence alone, in the row's order."""
        ...

    def store(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor | int,
        window: int | None = None,
        chunk: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Caches the tokens' key [T, G, Dk] and value [T, G, Dv]; returns the layer's pools of keys and of values.

        An int as `value` is the number of leading key columns that are the values.
        """
        ...


class Prompts(Protocol):
    """The prompts of an encoder-decoder's sequences: those that this pass encodes, and where all of them are cached."""

    @property
    def ids(self) -> torch.Tensor:
        """Token ids of the prompts to encode, one prompt after the other, int64 [E]."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """The token count of each prompt to encode; the sum is E."""
        ...

    @property
    def tables(self) -> torch.Tensor:
        """The block ids of each sequence's prompt, int32 [S, M]."""
        ...

    @property
    def length(self) -> torch.Tensor:
        """The length of the prompt that each decoder token attends to, int32 [T], on the host."""
        ...

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Caches key [E, G, Dk] and value [E, G, Dv] of the prompts to encode; returns the layer's pools."""
        ...

    def owners(self, tokens: Sequence[int]) -> list[int]:
        """Returns, for each of these prompt tokens, the index of a decoder token that belongs to the same sequence."""
        ...
