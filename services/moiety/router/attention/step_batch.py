"""One step's tokens as tensors: what the model reads, and where attention finds each token's past.

Shape legend: T tokens of the step, S sequences, M blocks of the longest table, G key/value heads, Dk, Dv head widths.
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
    slots: torch.Tensor  # int64 [T]: where each token's key and value go
    tables: torch.Tensor  # int32 [S, M]
    sequence: torch.Tensor  # int32 [T], on the host: row of `tables`
    length: torch.Tensor  # int32 [T], on the host: positions that the token sees, itself the last
    cross: CrossAttentionBatch | None = None  # of an encoder-decoder
    states: StepStates | None = None  # where the model keeps states: whose each token goes through

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
        """`counts[s]` tokens behind `past[s]` of the sequence with `tables[s]`, which has room for them."""
        own = [table.slot for table in tables if table.slot is not None]
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
            StepStates.build(cache.states, own, past, counts, device) if own else None,
        )

    def sequences(self) -> Iterator[StepBatch]:
        """Each sequence's tokens by themselves, in the step's order."""
        for row in range(len(self.tables)):
            own = torch.nonzero(self.sequence == row).flatten()
            there = own.to(self.positions.device)
            yield replace(
                self,
                positions=self.positions[there],
                slots=self.slots[there],
                tables=self.tables[row : row + 1],
                sequence=torch.zeros_like(self.sequence[own]),
                length=self.length[own],
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
        """Writes the step's key [T, G, Dk] and value [T, G, Dv]; returns the layer's pools of both.

        An int instead of `value` says how many leading columns of the keys are the values (`LayerSpec.shared`).
        """
        keys, values = self.cache.layer(layer)
        if isinstance(value, int):
            store(keys, None, key, None, self.slots)
        else:
            store(keys, values, key, value, self.slots)
        return keys, values


@dataclass(frozen=True, slots=True)
class CrossAttentionBatch:
    """Where the prompts of an encoder-decoder's sequences lie, and those that are to be encoded in this step.

    Shape legend as above, and E tokens of the prompts to be encoded, one prompt after the other.
    """

    cache: KVCache
    ids: torch.Tensor  # int64 [E]
    lengths: tuple[int, ...]  # of the prompts to be encoded
    slots: torch.Tensor  # int64 [E]
    tables: torch.Tensor  # int32 [S, M]
    length: torch.Tensor  # int32 [T], on the host: tokens of the prompt that a token of the step looks at
    first: tuple[int, ...]  # for each prompt to be encoded, its sequence's first token of the step

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
        """Sequence s has `counts[s]` tokens in the step and `prompts[s]`, for which `tables[s]` has blocks.

        `new[s]`: the prompt is to be encoded.
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
        """Writes key [E, G, Dk] and value [E, G, Dv] of the encoded prompts; returns the layer's pools of both."""
        keys, values = self.cache.layer(layer)
        if self.lengths:
            store(keys, values, key, value, self.slots)
        return keys, values

    def owners(self, tokens: Sequence[int]) -> list[int]:
        """For tokens of the prompts to be encoded: a token each of the step that is of the same sequence."""
        ends = np.cumsum(self.lengths)
        return [self.first[prompt] for prompt in np.searchsorted(ends, tokens, side="right").tolist()]


def _padded(tables: Sequence[BlockTable]) -> npt.NDArray[np.int32]:
    """[S, M]."""
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
    """int64 [T]: where each token lies in the pool."""
    slots: npt.NDArray[np.int64] = padded[sequence, positions // cache.block_tokens] * np.int64(cache.block_tokens)
    return slots + positions % cache.block_tokens
