"""Which replica computes which rows: a pure function of the routing and the table of live holders.

Legend: T tokens, K experts per token, E experts per layer, A = T * K assignments, in row-major order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moiety.core.experts import ExpertSet

NOBODY = -1
SEVERAL = -2

# Below this many rows an expert's cost is the streaming of its weights; from there on rows add to it.
KNEE_ROWS = 32


class Shared(Mapping[tuple[int, int], tuple[int, ...]]):
    """(layer, expert) -> the indices of its several holders, ascending; worked out when it is asked for.

    A table of 2,000 replicas has half a million entries, and a router's experts of the next seconds are a few thousand.
    """

    def __init__(self, experts: int, several: np.ndarray, holds: np.ndarray, members: tuple[tuple[int, ...], ...]):
        """`several`: cells (layer * experts + expert), ascending; `holds` [sets, cells]; `members`: replicas of a set."""
        self._experts, self._several, self._holds, self._members = experts, several, holds, members
        self._known: dict[tuple[int, int], tuple[int, ...]] = {}

    def __getitem__(self, pair: tuple[int, int]) -> tuple[int, ...]:
        if (known := self._known.get(pair)) is not None:
            return known
        sets = np.flatnonzero(self._holds[:, pair[0] * self._experts + pair[1]]).tolist()
        holders = tuple(sorted(index for one in sets for index in self._members[one]))
        if len(holders) < 2:
            raise KeyError(pair)
        self._known[pair] = holders
        return holders

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (divmod(cell, self._experts) for cell in self._several.tolist())

    def __len__(self) -> int:
        return len(self._several)


@dataclass(frozen=True, slots=True)
class HolderTable:
    """Who holds what, in a form that a decode step can look up in microseconds."""

    version: int = 0
    replicas: tuple[str, ...] = ()  # sorted ids
    sole: Mapping[int, np.ndarray] = field(
        default_factory=dict
    )  # layer -> [E] index of the one holder, or NOBODY, SEVERAL
    shared: Mapping[tuple[int, int], tuple[int, ...]] = field(
        default_factory=dict
    )  # (layer, expert) -> its several holders

    @classmethod
    def build(cls, version: int, held: Mapping[str, ExpertSet], layers: int, experts: int) -> HolderTable:
        """From replica id -> experts held, for a model of `layers` MoE layers with `experts` each.

        Replicas of a deployment hold one and the same set (`ExpertSet.parse` gives one value for one text), which is
        looked at once for all of them.
        """
        replicas = tuple(sorted(held))
        alike: dict[int, tuple[ExpertSet, list[int]]] = {}
        for index, replica in enumerate(replicas):
            alike.setdefault(id(held[replica]), (held[replica], []))[1].append(index)
        owner = np.full(layers * experts, NOBODY, dtype=np.int64)
        holders = np.zeros(layers * experts, dtype=np.int64)
        holds = np.zeros((len(alike), layers * experts), dtype=bool)
        for row, (experts_held, indices) in zip(holds, alike.values(), strict=True):
            cells = [
                layer * experts + expert
                for layer, ids in experts_held.by_layer.items()
                if layer < layers
                for expert in ids
                if expert < experts
            ]
            row[cells] = True
            owner[cells] = indices[0]
            holders[cells] += len(indices)
        owner[holders > 1] = SEVERAL
        members = tuple(tuple(same) for _, same in alike.values())
        shared = Shared(experts, np.flatnonzero(holders > 1), holds, members)
        return cls(version, replicas, dict(enumerate(owner.reshape(layers, experts))), shared)

    def held_only_by(self, layer: int, replicas: Collection[str]) -> np.ndarray:
        """bool [E]: the experts of `layer` that have holders, all of them among `replicas`."""
        among = np.array([replica in replicas for replica in self.replicas] + [False, False])  # SEVERAL, NOBODY
        only = among[self.sole[layer]]
        for expert in np.flatnonzero(self.sole[layer] == SEVERAL).tolist():
            only[expert] = all(among[holder] for holder in self.shared[layer, expert])
        return only

    def uncovered(self) -> list[tuple[int, int]]:
        """Every (layer, expert) without a live holder."""
        return [
            (layer, int(expert)) for layer, owner in self.sole.items() for expert in np.flatnonzero(owner == NOBODY)
        ]


@dataclass(frozen=True, slots=True)
class Holders:
    """Who is asked for which experts while placements change, and what that says of the change."""

    held: Mapping[str, ExpertSet]  # replica id -> what it may be asked for
    epoch: (
        int  # every replica's experts are those of this placement or a later one, and none that is leaving is asked for
    )


def holders(held: Mapping[str, ExpertSet], leaving: Mapping[str, ExpertSet], epochs: Mapping[str, int]) -> Holders:
    """From what each replica holds by the placement of its epoch, and what it still answers besides.

    An expert that is leaving a replica is asked for there only while nobody holds it: so none is ever without a holder
    on its way to another one, and none that is still needed counts as given up.
    """
    changing = {layer for experts in leaving.values() for layer in experts.by_layer}  # few, of thousands of replicas
    covered = ExpertSet(
        {layer: frozenset().union(*(experts.layer(layer) for experts in held.values())) for layer in changing}
    )
    needed = {replica: left for replica, experts in leaving.items() if (left := experts - covered)}
    taken_in = [epoch - (replica in needed) for replica, epoch in epochs.items()]
    asked = {replica: held[replica] | needed[replica] if replica in needed else held[replica] for replica in held}
    return Holders(asked, min(taken_in, default=0))


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Where each assignment goes."""

    parts: Mapping[str, np.ndarray]  # replica id -> assignments, ascending
    uncovered: np.ndarray  # assignments whose expert has no holder that may be asked


def plan_dispatch(
    table: HolderTable, layer: int, experts: np.ndarray, assignments: np.ndarray, avoid: Collection[str] = ()
) -> DispatchPlan:
    """Plans `assignments` (indices into `experts` [A], global ids) of one layer over the holders not in `avoid`.

    Whole experts go to one replica each: two replicas streaming the same weights for half the rows each gain nothing in
    decode. An expert's preferred holder is fixed by its id and its layer's, so sets stay disjoint and sticky from step to
    step, and a group may have more replicas than experts of a layer; it is passed over only when it is busier than another
    holder by what the expert itself costs, or more.
    """
    wanted = experts[assignments]
    owner = table.sole[layer][wanted]  # [len(assignments)]
    barred = {index for index, replica in enumerate(table.replicas) if replica in avoid} if avoid else set()
    if barred:
        owner = np.where(np.isin(owner, list(barred)), NOBODY, owner)
    if (owner == SEVERAL).any():
        owner = _choose(table, layer, wanted, owner, barred)
    share = np.bincount(owner - NOBODY).tolist()  # how much each gets, NOBODY first
    parts = {table.replicas[i - 1]: assignments[owner == i - 1] for i, count in enumerate(share) if i and count}
    return DispatchPlan(parts, assignments[owner == NOBODY])


def _choose(table: HolderTable, layer: int, wanted: np.ndarray, owner: np.ndarray, barred: set[int]) -> np.ndarray:
    """Replaces SEVERAL by the index of one holder per expert, or NOBODY."""
    activated, rows = np.unique(wanted, return_counts=True)
    owner_of = dict(zip(wanted.tolist(), owner.tolist(), strict=True))
    load = [0.0] * len(table.replicas)
    open_experts = []
    for expert, count in zip(activated.tolist(), rows.tolist(), strict=True):
        if (index := owner_of[expert]) >= 0:
            load[index] += _cost(count)
        elif index == SEVERAL:
            open_experts.append((count, expert))
    for count, expert in sorted(open_experts, key=lambda item: (-item[0], item[1])):
        holders: Sequence[int] = table.shared[layer, expert]
        if barred:
            holders = [index for index in holders if index not in barred]
        if not holders:
            owner_of[expert] = NOBODY
            continue
        preferred = holders[(expert + layer) % len(holders)]
        chosen, cost = preferred, _cost(count)
        if load[preferred] >= cost:  # else nobody is lighter by as much
            lightest = min(holders, key=load.__getitem__)
            chosen = preferred if load[preferred] - load[lightest] < cost else lightest
        load[chosen] += cost
        owner_of[expert] = chosen
    return np.array([owner_of[expert] for expert in wanted.tolist()], dtype=np.int64)


def _cost(rows: int) -> float:
    return max(1.0, rows / KNEE_ROWS)
