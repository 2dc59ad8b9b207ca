"""Which deployment holds which experts: a pure plan from the heat of each expert, with as few moves as it takes.

Groups hold every expert once between them, hot sets hold further copies of the hottest. Heat is device time
(`cost.heat`), so activated experts are balanced in decode and rows in prefill. The arithmetic is in `packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement
from moiety.errors import ConfigError
from moiety.policy.placement.packing import (
    Bins,
    Bools,
    Floats,
    Ints,
    Packing,
    copies_of,
    copy_counts,
    hottest,
    mend,
    pack,
    relabel,
)

TOLERANCE = 0.03  # of a layer's heaviest load: fewer moves are worth that much


@dataclass(frozen=True, slots=True)
class DeploymentCapacity:
    """One deployment as the planner sees it."""

    deployment: str
    experts: int  # (layer, expert) pairs that fit into the memory of a replica
    replicas: int = 1  # that share its load; one that has none now counts as one
    hot: bool = False  # holds copies of what a group holds, and may be empty


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """A placement, how it differs from the one in force, and what it is worth."""

    placement: Placement
    loads: Mapping[str, ExpertSet]  # deployment -> experts it must read
    drops: Mapping[str, ExpertSet]  # deployment -> experts it may forget
    moved_bytes: int  # that all replicas together read
    before: float  # load of the slowest replica of each layer, summed: device seconds a second on the critical path
    after: float
    balancedness: float  # mean over max load of replicas, layers weighted by their heat; 1 is even

    @property
    def changes(self) -> bool:
        return bool(self.loads or self.drops)

    @property
    def gain(self) -> float:
        """The part of the critical path that it saves, 0 to 1."""
        return 1.0 - self.after / self.before if self.before > 0 else 0.0

    def lines(self) -> Iterator[str]:
        """The plan for people, like a diff."""
        for name in sorted({*self.loads, *self.drops}):
            yield name
            for sign, experts in (("+", self.loads.get(name)), ("-", self.drops.get(name))):
                if experts is not None:
                    yield from (f"  {sign} {part}" for part in str(experts).split(";"))
        moved = sum(map(len, self.loads.values()))
        yield (
            f"{moved} experts to read, {self.moved_bytes / 1e9:.2f} GB in all; slowest replicas {self.before:.4g} → "
            f"{self.after:.4g} ({self.gain:+.1%} saved), balancedness {self.balancedness:.3f}, epoch {self.placement.epoch}"
        )


def plan_placement(
    heat: Floats, rooms: Sequence[DeploymentCapacity], current: Placement | None, expert_bytes: int = 0
) -> PlacementPlan:
    """A placement of experts with `heat` [L, E] in `rooms`, one epoch after `current`.

    1. Copies: each expert once in a group, and the hottest again wherever there is room to spare.
    2. Pack them, heaviest first; then start again from what is in force, and mend that by the best swaps.
    3. Of the two, layer by layer, the one with fewer moves unless it is worse by more than TOLERANCE.

    Deterministic. Raises ConfigError where the groups' memory cannot hold every expert once.
    """
    layers, experts = heat.shape
    names = tuple(room.deployment for room in rooms)
    held = held_table(rooms, current, layers, experts)
    bins = _bins(rooms, layers, experts)
    strength, home = bins.strength, bins.home
    owned = held.sum(axis=0)  # [L, E] copies now
    hot = np.flatnonzero(~home)
    copies, spare = np.zeros(layers, dtype=np.int64), bins.slots[:, home].sum(axis=1) - experts
    if len(hot):
        room = sum(each.experts for each in rooms if each.hot)
        copies = hottest(heat, owned, room, len(hot))
        bins = Bins(_deal(bins.slots, copies, rooms), strength, home)
    limit = len(rooms) if spare.any() else 1 + len(hot)
    counts = copy_counts(heat, spare + copies, owned, limit)
    empty = copies_of(heat, counts)
    best = mend(pack(empty, bins, experts), bins, experts)
    if current is not None and held.any():
        best = _nearest(best, empty, bins, experts, held)
    planned = best.held(len(rooms), experts)
    replicas = strength.astype(np.int64)
    if _valid(held, rooms, home) and _critical(heat, held, replicas) <= _critical(heat, planned, replicas):
        planned = held
    return _compared(heat, rooms, names, current, held, planned, expert_bytes)


def held_table(rooms: Sequence[DeploymentCapacity], placement: Placement | None, layers: int, experts: int) -> Bools:
    """[D, L, E] what each of `rooms` holds by `placement`; what the model lacks is left out."""
    held = np.zeros((len(rooms), layers, experts), dtype=bool)
    for index, room in enumerate(rooms):
        for layer, ids in (
            placement.held.get(room.deployment, ExpertSet()) if placement else ExpertSet()
        ).by_layer.items():
            if layer < layers:
                held[index, layer, [expert for expert in ids if expert < experts]] = True
    return held


def replica_loads(heat: Floats, held: Bools, replicas: Ints) -> Floats:
    """[D, L] load of one replica of each deployment, where an expert's heat is shared by all replicas that hold it."""
    table = held.astype(np.float64)
    holders = np.tensordot(replicas, table, axes=1)
    share = np.divide(heat, holders, out=np.zeros_like(heat), where=holders > 0)
    table *= share
    loads: Floats = table.sum(axis=2)
    return loads


def balancedness(loads: Floats, replicas: Ints) -> float:
    """Mean over max load of replicas [D, L], the layers weighted by their heaviest: 1 is even."""
    heaviest = loads.max(axis=0).sum()
    mean = (loads * replicas[:, None]).sum() / replicas.sum()
    return float(mean / heaviest) if heaviest > 0 else 1.0


def _critical(heat: Floats, held: Bools, replicas: Ints) -> float:
    return float(replica_loads(heat, held, replicas).max(axis=0).sum())


def _valid(held: Bools, rooms: Sequence[DeploymentCapacity], home: Bools) -> bool:
    """Whether every expert has a home and every deployment fits its memory."""
    fits = all(int(mine.sum()) <= room.experts for mine, room in zip(held, rooms, strict=True))
    return fits and bool(held[home].any(axis=0).all())


def _bins(rooms: Sequence[DeploymentCapacity], layers: int, experts: int) -> Bins:
    strength = np.array([max(room.replicas, 1) for room in rooms], dtype=np.float64)
    home = np.array([not room.hot for room in rooms])
    slots = np.array([0 if room.hot else min(room.experts // layers, experts) for room in rooms], dtype=np.int64)
    if (fit := int(slots.sum())) < experts:
        told = f"{int(home.sum())} groups have memory for {fit} experts of each layer, and it has {experts}"
        raise ConfigError("memory", fit, told)
    return Bins(np.tile(slots, (layers, 1)), strength, home)


def _deal(slots: Ints, copies: Ints, rooms: Sequence[DeploymentCapacity]) -> Ints:
    """`slots` with places for `copies` [L] in the hot sets, as even as their memory allows."""
    dealt = slots.copy()
    hot = [index for index, room in enumerate(rooms) if room.hot]
    left = np.array([rooms[index].experts for index in hot])
    for layer in np.argsort(-copies, kind="stable").tolist():
        wanted = int(copies[layer])
        while wanted > 0 and left.any():
            chosen = np.argsort(-left, kind="stable")[: min(wanted, np.count_nonzero(left))]
            left[chosen] -= 1
            dealt[layer, np.array(hot)[chosen]] += 1
            wanted -= len(chosen)
    return dealt


def _nearest(fresh: Packing, empty: Packing, bins: Bins, experts: int, held: Bools) -> Packing:
    """Layer by layer the packing with fewer moves from `held`, unless it is worse than `fresh` by over TOLERANCE."""
    goal = fresh.load(bins).max(axis=1) * (1.0 + TOLERANCE)
    kept = mend(pack(empty, bins, experts, start=held), bins, experts, target=goal)
    fresh = relabel(fresh, bins, experts, held)
    count = len(bins.strength)
    moves_kept = (kept.held(count, experts) & ~held).sum(axis=(0, 2))
    moves_fresh = (fresh.held(count, experts) & ~held).sum(axis=(0, 2))
    placed = (kept.bin != -1).sum(axis=1) >= (fresh.bin != -1).sum(axis=1)
    good = (kept.load(bins).max(axis=1) <= goal * (1.0 + 1e-9)) & (moves_kept <= moves_fresh) & placed
    return Packing(empty.expert, empty.primary, empty.share, np.where(good[:, None], kept.bin, fresh.bin))


def _compared(
    heat: Floats,
    rooms: Sequence[DeploymentCapacity],
    names: tuple[str, ...],
    current: Placement | None,
    before: Bools,
    after: Bools,
    expert_bytes: int,
) -> PlacementPlan:
    replicas = np.array([max(room.replicas, 1) for room in rooms])
    loads = replica_loads(heat, after, replicas)
    new, old = after & ~before, before & ~after
    others = {} if current is None else {name: held for name, held in current.held.items() if name not in names}
    moved = int((new.sum(axis=(1, 2)) * replicas).sum()) * expert_bytes
    return PlacementPlan(
        placement=Placement(
            epoch=1 if current is None else current.epoch + 1,
            held={**others, **{name: _experts(after[index]) for index, name in enumerate(names)}},
        ),
        loads={name: _experts(new[index]) for index, name in enumerate(names) if new[index].any()},
        drops={name: _experts(old[index]) for index, name in enumerate(names) if old[index].any()},
        moved_bytes=moved,
        before=_critical(heat, before, replicas),
        after=float(loads.max(axis=0).sum()),
        balancedness=balancedness(loads, replicas),
    )


def _experts(held: Bools) -> ExpertSet:
    """[L, E] as a set."""
    return ExpertSet({layer: frozenset(np.flatnonzero(row).tolist()) for layer, row in enumerate(held) if row.any()})
