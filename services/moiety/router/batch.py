"""One step's tokens as tensors: what the model reads, and where attention finds each token's past.

Shape legend: T tokens of the step, S sequences, M blocks of the longest table, G key/value heads, Dk, Dv head widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moiety.router.blocks import BlockTable
from moiety.router.kvcache import KVCache
from moiety.router.states import StepStates
from moiety_kernels.paged_attention import store


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The attention metadata of a step, built once and read by every layer."""

    cache: KVCache
    positions: torch.Tensor  # int64 [T]
    slots: torch.Tensor  # int64 [T]: where each token's key and value go
    tables: torch.Tensor  # int32 [S, M]
    sequence: torch.Tensor  # int32 [T], on the host: row of `tables`
    length: torch.Tensor  # int32 [T], on the host: positions that the token sees, itself the last
    states: StepStates | None = None  # where the model keeps states: whose each token goes through

    @classmethod
    def build(
        cls,
        cache: KVCache,
        tables: Sequence[BlockTable],
        past: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
    ) -> StepBatch:
        """`counts[s]` tokens behind `past[s]` of the sequence with `tables[s]`, which has room for them."""
        own = [table.slot for table in tables if table.slot is not None]
        count = np.array(counts)
        sequence = np.repeat(np.arange(len(count)), count)
        begin = np.cumsum(count) - count
        positions = np.arange(len(sequence)) + np.repeat(np.array(past) - begin, count)
        padded = np.zeros((len(tables), max(table.count for table in tables)), np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: table.count] = table.ids[: table.count]
        slots = padded[sequence, positions // cache.block_tokens] * np.int64(cache.block_tokens)
        slots += positions % cache.block_tokens
        return cls(
            cache,
            torch.from_numpy(positions).to(device),
            torch.from_numpy(slots).to(device),
            torch.from_numpy(padded).to(device),
            torch.from_numpy(sequence.astype(np.int32)),
            torch.from_numpy((positions + 1).astype(np.int32)),
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
