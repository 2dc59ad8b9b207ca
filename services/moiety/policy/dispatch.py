"""Which replica computes which rows: a pure function of the routing and the table of live holders.

Legend: T tokens, K experts per token, E experts per layer, A = T * K assignments, in row-major order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from moiety.core import ExpertSet

NOBODY = -1
SEVERAL = -2

# Below this many rows an expert's cost is the streaming of its weights; from there on rows add to it.
KNEE_ROWS = 32


@dataclass(frozen=True, slots=True)
class Table:
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
    def build(cls, version: int, held: Mapping[str, ExpertSet], layers: int, experts: int) -> Table:
        """From replica id -> experts held, for a model of `layers` MoE layers with `experts` each."""
        replicas = tuple(sorted(held))
        holders: dict[tuple[int, int], list[int]] = {}
        for index, replica in enumerate(replicas):
            for pair in held[replica]:
                holders.setdefault(pair, []).append(index)
        sole = {layer: np.full(experts, NOBODY, dtype=np.int64) for layer in range(layers)}
        shared = {}
        for (layer, expert), indices in holders.items():
            if layer >= layers or expert >= experts:
                continue
            sole[layer][expert] = indices[0] if len(indices) == 1 else SEVERAL
            if len(indices) > 1:
                shared[layer, expert] = tuple(indices)
        return cls(version, replicas, sole, shared)

    def held_only_by(self, layer: int, replicas: Collection[str]) -> np.ndarray:
        """bool [E]: the experts of `layer` that have holders, all of them among `replicas`."""
        among = np.array([replica in replicas for replica in self.replicas] + [False, False])  # SEVERAL, NOBODY
        only = among[self.sole[layer]]
        for (of_layer, expert), holders in self.shared.items():
            if of_layer == layer:
                only[expert] = all(among[holder] for holder in holders)
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
class Plan:
    """Where each assignment goes."""

    parts: Mapping[str, np.ndarray]  # replica id -> assignments, ascending
    uncovered: np.ndarray  # assignments whose expert has no holder that may be asked


def plan(table: Table, layer: int, experts: np.ndarray, assignments: np.ndarray, avoid: Collection[str] = ()) -> Plan:
    """Plans `assignments` (indices into `experts` [A], global ids) of one layer over the holders not in `avoid`.

    Whole experts go to one replica each: two replicas streaming the same weights for half the rows each gain nothing in
    decode. An expert's preferred holder is fixed by its id, so sets stay disjoint and sticky from step to step; it is
    passed over only when it is busier than another holder by what the expert itself costs, or more.
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
    return Plan(parts, assignments[owner == NOBODY])


def _choose(table: Table, layer: int, wanted: np.ndarray, owner: np.ndarray, barred: set[int]) -> np.ndarray:
    """Replaces SEVERAL by the index of one holder per expert, or NOBODY."""
    activated, rows = np.unique(wanted, return_counts=True)
    owner_of = dict(zip(wanted.tolist(), owner.tolist(), strict=True))
    load = np.zeros(len(table.replicas))
    open_experts = []
    for expert, count in zip(activated.tolist(), rows.tolist(), strict=True):
        if (index := owner_of[expert]) >= 0:
            load[index] += _cost(count)
        elif index == SEVERAL:
            open_experts.append((count, expert))
    for count, expert in sorted(open_experts, key=lambda item: (-item[0], item[1])):
        holders = [index for index in table.shared[layer, expert] if index not in barred]
        if not holders:
            owner_of[expert] = NOBODY
            continue
        preferred = holders[expert % len(holders)]
        lightest = min(holders, key=lambda index: load[index])
        chosen = preferred if load[preferred] - load[lightest] < _cost(count) else lightest
        load[chosen] += _cost(count)
        owner_of[expert] = chosen
    return np.array([owner_of[expert] for expert in wanted.tolist()], dtype=np.int64)


def _cost(rows: int) -> float:
    return max(1.0, rows / KNEE_ROWS)
