"""Recurrent and convolution states, which layers keep per sequence, in slots: one slot for each sequence.

A step does not change a state in place. Each state has two rows: a step reads the committed row and writes the other,
also when it runs again, and `commit` swaps them when the step is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from moiety.router.cache.cache_spec import StateKey, StateSpec


class SlotStates:
    """The states of `slots` sequences. A slot that was just taken has no valid state, and its first step does not read one."""

    def __init__(self, specs: Mapping[StateKey, StateSpec], slots: int, device: torch.device):
        self.slots = slots
        self._free = list(range(slots - 1, -1, -1))  # a stack, so that memory already touched is reused first
        self._committed = [0] * slots  # 0 or 1 for each slot: which of its two rows is committed
        # Uninitialised: on a CPU the operating system allocates pages only as they are written.
        self._rows = {
            key: torch.empty(2 * slots, *spec.shape, dtype=spec.dtype, device=device) for key, spec in specs.items()
        }

    def rows(self, key: StateKey) -> torch.Tensor:
        """Returns both rows of one state for all slots, [2 * slots, ...]."""
        return self._rows[key]

    def committed(self, slot: int) -> int:
        """Returns the row index, in every state's `rows`, of the states of `slot` after the last committed step."""
        return 2 * slot + self._committed[slot]

    def pending(self, slot: int) -> int:
        """Returns the row index, in every state's `rows`, at which the current step writes the states of `slot`."""
        return 2 * slot + 1 - self._committed[slot]

    def commit(self, slot: int) -> None:
        """Makes the states that the step wrote for `slot` the committed ones."""
        self._committed[slot] = 1 - self._committed[slot]

    def take(self) -> int:
        """Takes a slot. Call only if `available` is not 0."""
        return self._free.pop()

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def copy(self, source: int, target: int) -> None:
        """Copies the committed states of slot `source` to slot `target`."""
        for rows in self._rows.values():
            rows[self.committed(target)] = rows[self.committed(source)]

    def check(self, held: Iterable[int]) -> None:
        """Raises RuntimeError unless every slot is free or occurs once in `held`."""
        places = Counter(self._free)
        places.update(held)
        for slot in range(self.slots):
            if places[slot] != 1:
                raise RuntimeError(f"state slot {slot} is listed {places[slot]} times as free or held, not once")


@dataclass(frozen=True, slots=True)
class StateGroup:
    """Sequences that a layer computes together. All have equally many tokens in a step; all are new or all continued."""

    sequences: int
    tokens: int  # of each sequence
    read: torch.Tensor | None  # int64 [sequences]: rows of their states; None for new sequences
    write: torch.Tensor  # int64 [sequences]: rows for their new states


@dataclass(frozen=True, slots=True)
class StepStates:
    """A step as state layers compute it: its groups of sequences, and its tokens ordered by group, then by sequence."""

    states: SlotStates
    groups: tuple[StateGroup, ...]
    tokens: int  # of the whole step
    order: torch.Tensor | None  # int64 [tokens]: the step's token at each place; None if in that order already
    back: torch.Tensor | None  # int64 [tokens]: the inverse of `order`

    @classmethod
    def build(
        cls,
        states: SlotStates,
        slots: Sequence[int],
        past: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
    ) -> StepStates:
        """Groups a step's sequences. Sequence s has slot `slots[s]` and computes `counts[s]` tokens after `past[s]` others."""
        by_count: dict[tuple[int, bool], list[int]] = {}  # (tokens, whether the sequence is new) -> sequences
        for sequence, (computed, count) in enumerate(zip(past, counts, strict=True)):
            by_count.setdefault((count, computed == 0), []).append(sequence)
        begins = list(accumulate(counts, initial=0))
        groups, order = [], []
        for (count, new), members in by_count.items():
            order += [token for member in members for token in range(begins[member], begins[member] + count)]
            read = None if new else torch.tensor([states.committed(slots[m]) for m in members]).to(device)
            write = torch.tensor([states.pending(slots[m]) for m in members]).to(device)
            groups.append(StateGroup(len(members), count, read, write))
        permutation = None if order == list(range(begins[-1])) else torch.tensor(order)
        return cls(
            states,
            tuple(groups),
            begins[-1],
            None if permutation is None else permutation.to(device),
            None if permutation is None else permutation.argsort().to(device),
        )
