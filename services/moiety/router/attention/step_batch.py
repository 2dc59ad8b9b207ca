"""One step's tokens as tensors: what the model reads, and where attention finds each token's past.

Shape legend: T tokens of the step, S sequences, M blocks of the longest table, G key/value heads, Dk and Dv head widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from moiety.router.cache.blocks import BlockTable
from moiety.router.cache.kv_cache import KVCache
from moiety.router.cache.state_slots import StepStates
from moiety_kernels.ops.paged_attention import store


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The attention metadata of a step, built once and read by every layer."""

    cache: KVCache
    positions: torch.Tensor  # int64 [T]
    slots: torch.Tensor  # int64 [T]: place of each token's key and value in the pool
    tables: torch.Tensor  # int32 [S, M]
    sequence: torch.Tensor  # int32 [T], on the host: row of `tables`
    length: torch.Tensor  # int32 [T], on the host: number of positions up to and including the token
    cross: CrossAttentionBatch | None = None  # for an encoder-decoder
    states: StepStates | None = None  # for a model with states: which state each token updates

    @classmethod
    def build(
        cls,
        cache: KVCache,
        tables: Sequence[BlockTable],
        past: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
        cross: CrossAttentionBatch | None = None,
    ) -> StepBatch:
        """Builds a step in which sequence s computes `counts[s]` tokens after its first `past[s]` tokens.

        `tables[s]` must have blocks for all of these tokens.
        """
        state_slots = [table.slot for table in tables if table.slot is not None]
        count = np.array(counts)
        sequence = np.repeat(np.arange(len(count)), count)
        begin = np.cumsum(count) - count
        positions = np.arange(len(sequence)) + np.repeat(np.array(past) - begin, count)
        padded = _padded(tables)
        return cls(
            cache,
            torch.from_numpy(positions).to(device),
            torch.from_numpy(_slots(cache, padded, sequence, positions)).to(device),
            torch.from_numpy(padded).to(device),
            torch.from_numpy(sequence.astype(np.int32)),
            torch.from_numpy((positions + 1).astype(np.int32)),
            cross,
            StepStates.build(cache.states, state_slots, past, counts, device) if state_slots else None,
        )

    def sequences(self) -> Iterator[StepBatch]:
        """Yields a batch of each sequence alone, in the step's order."""
        for row in range(len(self.tables)):
            tokens = torch.nonzero(self.sequence == row).flatten()
            device_tokens = tokens.to(self.positions.device)
            yield replace(
                self,
                positions=self.positions[device_tokens],
                slots=self.slots[device_tokens],
                tables=self.tables[row : row + 1],
                sequence=torch.zeros_like(self.sequence[tokens]),
                length=self.length[tokens],
                states=None,
            )

    def store(
        self,
        layer: int,
        key: torch.Tensor,
        value: torch.Tensor | int,
        window: int | None = None,
        chunk: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the step's key [T, G, Dk] and value [T, G, Dv]; returns the layer's pools of keys and of values.

        An int as `value` is the number of leading key columns that are the values (`LayerSpec.shared`).
        """
        keys, values = self.cache.layer(layer)
        if isinstance(value, int):
            store(keys, None, key, None, self.slots)
        else:
            store(keys, values, key, value, self.slots)
        return keys, values


@dataclass(frozen=True, slots=True)
class CrossAttentionBatch:
    """The prompts of an encoder-decoder's sequences: where they are cached, and which of them this step encodes.

    Shape legend: that of the module, and E tokens of the prompts that this step encodes, one prompt after the other.
    """

    cache: KVCache
    ids: torch.Tensor  # int64 [E]
    lengths: tuple[int, ...]  # tokens of each prompt to encode
    slots: torch.Tensor  # int64 [E]: place of each token's key and value in the pool
    tables: torch.Tensor  # int32 [S, M]
    length: torch.Tensor  # int32 [T], on the host: length of the prompt that each token attends to
    first: tuple[int, ...]  # for each prompt to encode, the index of its sequence's first token in the step

    @classmethod
    def build(
        cls,
        cache: KVCache,
        prompts: Sequence[Sequence[int]],
        tables: Sequence[BlockTable],
        new: Sequence[bool],
        counts: Sequence[int],
        device: torch.device,
    ) -> CrossAttentionBatch:
        """Builds a batch in which sequence s computes `counts[s]` output tokens and has the prompt `prompts[s]`.

        The prompt is cached in the blocks of `tables[s]`; `new[s]` says whether this step encodes it.
        """
        encoded = [s for s, is_new in enumerate(new) if is_new]
        lengths = [len(prompts[s]) for s in encoded]
        count, padded = np.array(lengths, np.int64), _padded(tables)
        rows = np.repeat(np.array(encoded, np.int64), count)
        positions = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        begin = np.cumsum(counts) - np.array(counts)
        seen = np.repeat(np.array([len(prompt) for prompt in prompts], np.int32), counts)
        return cls(
            cache,
            torch.tensor([token for s in encoded for token in prompts[s]], dtype=torch.long, device=device),
            tuple(lengths),
            torch.from_numpy(_slots(cache, padded, rows, positions)).to(device),
            torch.from_numpy(padded).to(device),
            torch.from_numpy(seen),
            tuple(begin[encoded].tolist()),
        )

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes key [E, G, Dk] and value [E, G, Dv] of prompts to encode; returns the layer's pools of keys and of values."""
        keys, values = self.cache.layer(layer)
        if self.lengths:
            store(keys, values, key, value, self.slots)
        return keys, values

    def owners(self, tokens: Sequence[int]) -> list[int]:
        """Maps indices of prompt tokens in [E] to the index in the step of their sequence's first output token."""
        ends = np.cumsum(self.lengths)
        return [self.first[prompt] for prompt in np.searchsorted(ends, tokens, side="right").tolist()]


def _padded(tables: Sequence[BlockTable]) -> npt.NDArray[np.int32]:
    """Returns the block ids of `tables` as one array [S, M], with 0 after the end of a shorter table."""
    padded = np.zeros((len(tables), max(table.count for table in tables)), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: table.count] = table.ids[: table.count]
    return padded


def _slots(
    cache: KVCache,
    padded: npt.NDArray[np.int32],
    sequence: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Returns the place of each token in the pool, int64 [T]: block id times tokens per block, plus offset in the block."""
    slots: npt.NDArray[np.int64] = padded[sequence, positions // cache.block_tokens] * np.int64(cache.block_tokens)
    return slots + positions % cache.block_tokens
