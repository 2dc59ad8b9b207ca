"""What layers keep of a whole sequence, in slots: recurrent and convolution states; one slot a sequence.

A step never changes a state in place. Each lies in two rows: a step reads the committed one and writes the other, as often
as it must be run again, and `commit` swaps them when it is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from moiety.router.cache.cache_spec import StateKey, StateSpec


class SlotStates:
    """The states of `slots` sequences. A slot that was just taken holds nothing: its first step reads none of it."""

    def __init__(self, specs: Mapping[StateKey, StateSpec], slots: int, device: torch.device):
        self.slots = slots
        self._free = list(range(slots - 1, -1, -1))  # a stack: memory that was touched is used again first
        self._committed = [0] * slots  # which of a slot's two rows
        # Uninitialised, so on a CPU the kernel hands out pages only as they are written.
        self._rows = {
            key: torch.empty(2 * slots, *spec.shape, dtype=spec.dtype, device=device) for key, spec in specs.items()
        }

    @property
    def available(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free)

    def rows(self, key: StateKey) -> torch.Tensor:
        """All sequences' states of one kind [2 * slots, ...]."""
        return self._rows[key]

    def committed(self, slot: int) -> int:
        """The row that holds a state after the last step that was done."""
        return 2 * slot + self._committed[slot]

    def pending(self, slot: int) -> int:
        """The row into which a step writes a state."""
        return 2 * slot + 1 - self._committed[slot]

    def commit(self, slot: int) -> None:
        """The step is done: what it wrote is the state."""
        self._committed[slot] = 1 - self._committed[slot]

    def take(self) -> int:
        """A slot of one's own. Only while `available`."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def copy(self, source: int, target: int) -> None:
        """Gives slot `target` the committed states of `source`."""
        for rows in self._rows.values():
            rows[self.committed(target)] = rows[self.committed(source)]

    def check(self, held: Iterable[int]) -> None:
        """Raises RuntimeError unless every slot is free or occurs once in `held`."""
        places = Counter(self._free)
        places.update(held)
        for slot in range(self.slots):
            if places[slot] != 1:
                raise RuntimeError(f"state slot {slot} is free or held {places[slot]} times over")


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that have equally many tokens in a step, so that a layer computes them together."""

    sequences: int
    tokens: int  # of each
    read: torch.Tensor | None  # int64 [sequences]: rows of their states; None where they have none yet
    write: torch.Tensor  # int64 [sequences]


@dataclass(frozen=True, slots=True)
class StepStates:
    """Through whose states a step's tokens go: those of the first group's first sequence, of its second, ..."""

    states: SlotStates
    groups: tuple[Group, ...]
    tokens: int  # of the step
    order: torch.Tensor | None  # int64 [tokens]: which token of the step is where; None where they lie so already
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
        """`counts[s]` tokens behind `past[s]` of the sequence with the slot `slots[s]`."""
        alike: dict[tuple[int, bool], list[int]] = {}
        for sequence, (behind, count) in enumerate(zip(past, counts, strict=True)):
            alike.setdefault((count, behind == 0), []).append(sequence)
        begins = list(accumulate(counts, initial=0))
        groups, order = [], []
        for (count, new), members in alike.items():
            order += [token for member in members for token in range(begins[member], begins[member] + count)]
            read = None if new else torch.tensor([states.committed(slots[m]) for m in members]).to(device)
            write = torch.tensor([states.pending(slots[m]) for m in members]).to(device)
            groups.append(Group(len(members), count, read, write))
        moved = None if order == list(range(begins[-1])) else torch.tensor(order)
        return cls(
            states,
            tuple(groups),
            begins[-1],
            None if moved is None else moved.to(device),
            None if moved is None else moved.argsort().to(device),
        )
