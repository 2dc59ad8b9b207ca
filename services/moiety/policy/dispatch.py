"""Decides which replica computes which rows: a pure function of the routing and the table of live holders.

Legend: T tokens, K experts per token, E experts per layer, A = T * K assignments, in row-major order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moiety.core.experts import ExpertSet

NO_HOLDER = -1
MANY_HOLDERS = -2

# With fewer rows, reading an expert's weights dominates its cost; from here on, rows do.
KNEE_ROWS = 32


class SharedHolders(Mapping[tuple[int, int], tuple[int, ...]]):
    """Maps each (layer, expert) with several holders to the holders' indices, ascending. An entry is computed when looked up.

    A table of 2,000 replicas has half a million entries; a router uses a few thousand of them within seconds.
    """

    def __init__(self, experts: int, several: np.ndarray, holds: np.ndarray, members: tuple[tuple[int, ...], ...]):
        """`several`: the cells (a cell is layer * experts + expert) with two or more holders, ascending.

        Replicas with the same experts form one set. `holds`: bool [sets, cells], whether a set contains a cell.
        `members`: the indices of each set's replicas.
        """
        self._experts, self._several, self._holds, self._members = experts, several, holds, members
        self._known: dict[tuple[int, int], tuple[int, ...]] = {}

    def __getitem__(self, pair: tuple[int, int]) -> tuple[int, ...]:
        if (known := self._known.get(pair)) is not None:
            return known
        sets = np.flatnonzero(self._holds[:, pair[0] * self._experts + pair[1]]).tolist()
        holders = tuple(sorted(index for number in sets for index in self._members[number]))
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
    """Which live replicas hold which experts; a look-up takes microseconds."""

    version: int = 0
    replicas: tuple[str, ...] = ()  # sorted ids
    # layer -> [E] index of the only holder, or NO_HOLDER, MANY_HOLDERS
    sole: Mapping[int, np.ndarray] = field(default_factory=dict)
    # (layer, expert) -> indices of its holders, for experts with several
    shared: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def build(cls, version: int, held: Mapping[str, ExpertSet], layers: int, experts: int) -> HolderTable:
        """Builds the table from replica id -> experts held, for a model of `layers` MoE layers with `experts` each.

        Replicas of a deployment share one ExpertSet object (`ExpertSet.parse` returns the same object for the same text),
        so each set is read once for all of them.
        """
        replicas = tuple(sorted(held))
        by_set: dict[int, tuple[ExpertSet, list[int]]] = {}
        for index, replica in enumerate(replicas):
            by_set.setdefault(id(held[replica]), (held[replica], []))[1].append(index)
        owner = np.full(layers * experts, NO_HOLDER, dtype=np.int64)
        holders = np.zeros(layers * experts, dtype=np.int64)
        holds = np.zeros((len(by_set), layers * experts), dtype=bool)
        for row, (experts_held, indices) in zip(holds, by_set.values(), strict=True):
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
        owner[holders > 1] = MANY_HOLDERS
        members = tuple(tuple(indices) for _, indices in by_set.values())
        shared = SharedHolders(experts, np.flatnonzero(holders > 1), holds, members)
        return cls(version, replicas, dict(enumerate(owner.reshape(layers, experts))), shared)

    def held_only_by(self, layer: int, replicas: Collection[str]) -> np.ndarray:
        """Returns bool [E]: the experts of `layer` that have holders, all of them in `replicas`."""
        among = np.array([replica in replicas for replica in self.replicas] + [False, False])  # MANY_HOLDERS, NO_HOLDER
        only = among[self.sole[layer]]
        for expert in np.flatnonzero(self.sole[layer] == MANY_HOLDERS).tolist():
            only[expert] = all(among[holder] for holder in self.shared[layer, expert])
        return only

    def uncovered(self) -> list[tuple[int, int]]:
        """Returns every (layer, expert) without a live holder."""
        return [
            (layer, int(expert)) for layer, owner in self.sole.items() for expert in np.flatnonzero(owner == NO_HOLDER)
        ]


@dataclass(frozen=True, slots=True)
class ReplicaHolding:
    """The experts of one replica."""

    held: ExpertSet  # by the placement of `epoch`
    leaving: ExpertSet  # by earlier placements: it still answers for them until it drops them
    epoch: int


@dataclass(frozen=True, slots=True)
class CallableExperts:
    """Which experts each replica may be called for while a placement changes, and the epoch of the last complete placement."""

    held: Mapping[str, ExpertSet]  # replica id -> experts that it may be called for
    # All replicas follow this placement or a later one, and none is called for an expert that it drops by it.
    epoch: int


def holders(holdings: Mapping[str, ReplicaHolding]) -> CallableExperts:
    """Returns which experts each replica may be called for: those it holds, and those `leaving` it that are still needed.

    `holdings` are by replica id. A leaving expert is needed while no replica holds it. An expert on its way to another
    replica therefore keeps a holder. While a replica's leaving experts are needed, its epoch does not count as complete.
    """
    changing = {layer for of in holdings.values() for layer in of.leaving.by_layer}  # few layers change at a time
    covered = ExpertSet(
        {layer: frozenset().union(*(of.held.layer(layer) for of in holdings.values())) for layer in changing}
    )
    needed = {replica: left for replica, of in holdings.items() if (left := of.leaving - covered)}
    completed = [of.epoch - (replica in needed) for replica, of in holdings.items()]
    callable_ = {
        replica: of.held | needed[replica] if replica in needed else of.held for replica, of in holdings.items()
    }
    return CallableExperts(callable_, min(completed, default=0))


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Where each assignment goes."""

    parts: Mapping[str, np.ndarray]  # replica id -> assignments, ascending
    uncovered: np.ndarray  # assignments whose expert has no holder outside `avoid`


def plan_dispatch(
    table: HolderTable, layer: int, experts: np.ndarray, assignments: np.ndarray, avoid: Collection[str] = ()
) -> DispatchPlan:
    """Plans `assignments` (indices into `experts` [A], global ids) of one layer over the holders not in `avoid`.

    All rows of an expert go to one replica: two replicas that read the same weights for half the rows each gain nothing in
    decode. The ids of expert and layer determine an expert's preferred holder. Replicas therefore get disjoint experts, the
    same from step to step, and a group with more replicas than experts per layer uses other replicas in other layers.
    An expert goes to another holder only if that holder's load is lower by at least the cost of the expert.
    """
    wanted = experts[assignments]
    owner = table.sole[layer][wanted]  # [len(assignments)]
    barred = {index for index, replica in enumerate(table.replicas) if replica in avoid} if avoid else set()
    if barred:
        owner = np.where(np.isin(owner, list(barred)), NO_HOLDER, owner)
    if (owner == MANY_HOLDERS).any():
        owner = _choose(table, layer, wanted, owner, barred)
    share = np.bincount(owner - NO_HOLDER).tolist()  # assignments of each replica, NO_HOLDER first
    parts = {table.replicas[i - 1]: assignments[owner == i - 1] for i, count in enumerate(share) if i and count}
    return DispatchPlan(parts, assignments[owner == NO_HOLDER])


def _choose(table: HolderTable, layer: int, wanted: np.ndarray, owner: np.ndarray, barred: set[int]) -> np.ndarray:
    """Returns `owner` with each MANY_HOLDERS replaced by one holder of the expert, or by NO_HOLDER if all are `barred`."""
    activated, rows = np.unique(wanted, return_counts=True)
    owner_of = dict(zip(wanted.tolist(), owner.tolist(), strict=True))
    load = [0.0] * len(table.replicas)
    open_experts = []
    for expert, count in zip(activated.tolist(), rows.tolist(), strict=True):
        if (index := owner_of[expert]) >= 0:
            load[index] += _cost(count)
        elif index == MANY_HOLDERS:
            open_experts.append((count, expert))
    for count, expert in sorted(open_experts, key=lambda item: (-item[0], item[1])):
        holders: Sequence[int] = table.shared[layer, expert]
        if barred:
            holders = [index for index in holders if index not in barred]
        if not holders:
            owner_of[expert] = NO_HOLDER
            continue
        preferred = holders[(expert + layer) % len(holders)]
        chosen, cost = preferred, _cost(count)
        if load[preferred] >= cost:  # otherwise no holder can be lighter by `cost`
            lightest = min(holders, key=load.__getitem__)
            chosen = preferred if load[preferred] - load[lightest] < cost else lightest
        load[chosen] += cost
        owner_of[expert] = chosen
    return np.array([owner_of[expert] for expert in wanted.tolist()], dtype=np.int64)


def _cost(rows: int) -> float:
    return max(1.0, rows / KNEE_ROWS)
