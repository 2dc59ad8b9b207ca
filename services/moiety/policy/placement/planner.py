"""Plans which deployment holds which experts from the load of each expert, with few moves: a pure function.

Groups hold every expert once between them; hot sets hold further copies of the hottest experts. An expert's load is device
time per second (`cost_model.expert_load`), so decode balances activated experts and prefill balances rows. `packing.py` has
the arithmetic.

Legend: D deployments, L layers, E experts per layer.
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
    hot_copies_per_layer,
    improve,
    pack,
    relabel,
)

TOLERANCE = 0.03  # a plan with fewer moves may raise a layer's heaviest load by this fraction


@dataclass(frozen=True, slots=True)
class DeploymentCapacity:
    """What one deployment can hold, and how many replicas share its load."""

    deployment: str
    experts: int  # (layer, expert) pairs that fit into the memory of a replica
    replicas: int = 1  # replicas that share its load; 0 counts as 1
    hot: bool = False  # a hot set: holds copies of experts that groups hold, and may be empty


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """A placement, its difference from the one in force, and its gain."""

    placement: Placement
    loads: Mapping[str, ExpertSet]  # deployment -> experts it must load
    drops: Mapping[str, ExpertSet]  # deployment -> experts it may drop
    moved_bytes: int  # bytes that all replicas together load
    before: float  # critical path now: load of each layer's slowest replica, summed; device seconds per second
    after: float  # critical path under this plan
    balancedness: float  # mean over max load of replicas, layers weighted by their heaviest load; 1 is even

    @property
    def changes(self) -> bool:
        return bool(self.loads or self.drops)

    @property
    def gain(self) -> float:
        """The fraction of the current critical path (`before`) that the plan saves, 0 to 1."""
        return 1.0 - self.after / self.before if self.before > 0 else 0.0

    def lines(self) -> Iterator[str]:
        """Yields the plan as text, like a diff, with what its signs and numbers mean."""
        epoch = self.placement.epoch
        if not self.changes:
            yield f"nothing to change: placement {epoch - 1} is the best that is known for this load"
        else:
            yield f"placement {epoch - 1} → {epoch}: + experts to load, - experts to drop, as LAYERS:EXPERTS counted from 0"
            for name in sorted({*self.loads, *self.drops}):
                yield name
                for sign, experts in (("+", self.loads.get(name)), ("-", self.drops.get(name))):
                    if experts is not None:
                        yield from (f"  {sign} {part}" for part in str(experts).split(";"))
            loaded, dropped = (sum(map(len, moved.values())) for moved in (self.loads, self.drops))
            yield f"cost:    {loaded} experts to load, {self.moved_bytes / 1e9:.2f} GB over all replicas; {dropped} to drop"
        yield (
            f"gain:    {self.gain:.1%} of the critical path, {self.before:.4g} → {self.after:.4g} device seconds per second "
            "(each layer's slowest replica, summed)"
        )
        yield f"balance: {self.balancedness:.3f} (mean load of a replica by the heaviest; 1 is even)"


def plan_placement(
    expert_load: Floats, capacities: Sequence[DeploymentCapacity], current: Placement | None, expert_bytes: int = 0
) -> PlacementPlan:
    """Plans a placement of experts with `expert_load` [L, E] on `capacities`, one epoch after `current`.

    1. Copies: one of each expert in a group, and further copies of the hottest experts where memory is left.
    2. Pack the copies twice, heaviest first: from scratch, and starting from `current`. Improve both by the best swaps.
    3. Layer by layer, take the packing from `current`, unless it needs more moves than the packing from scratch or its
       heaviest load is higher by more than TOLERANCE.
    4. If `current` is valid and its critical path (each layer's heaviest replica load, summed) is no longer than the
       result's, plan no change.

    Deterministic. Raises ConfigError when the groups' memory cannot hold every expert once.
    """
    layers, experts = expert_load.shape
    names = tuple(capacity.deployment for capacity in capacities)
    held = held_table(capacities, current, layers, experts)
    bins = _bins(capacities, layers, experts)
    strength, home = bins.strength, bins.home
    owned = held.sum(axis=0)  # [L, E] copies now
    hot = np.flatnonzero(~home)
    copies, spare = np.zeros(layers, dtype=np.int64), bins.slots[:, home].sum(axis=1) - experts
    if len(hot):
        hot_places = sum(capacity.experts for capacity in capacities if capacity.hot)
        copies = hot_copies_per_layer(expert_load, owned, hot_places, len(hot))
        bins = Bins(_deal(bins.slots, copies, capacities), strength, home)
    limit = len(capacities) if spare.any() else 1 + len(hot)
    counts = copy_counts(expert_load, spare + copies, owned, limit)
    empty = copies_of(expert_load, counts)
    best = improve(pack(empty, bins, experts), bins, experts)
    if current is not None and held.any():
        best = _nearest(best, empty, bins, experts, held)
    planned = best.held(len(capacities), experts)
    replicas = strength.astype(np.int64)
    no_worse = _critical(expert_load, held, replicas) <= _critical(expert_load, planned, replicas)
    if _valid(held, capacities, home) and no_worse:
        planned = held
    return _compared(expert_load, capacities, names, current, held, planned, expert_bytes)


def held_table(
    capacities: Sequence[DeploymentCapacity], placement: Placement | None, layers: int, experts: int
) -> Bools:
    """Returns [D, L, E]: whether each of `capacities` holds an expert by `placement`. Ignores ids beyond L or E."""
    held = np.zeros((len(capacities), layers, experts), dtype=bool)
    for index, capacity in enumerate(capacities):
        for layer, ids in (
            placement.held.get(capacity.deployment, ExpertSet()) if placement else ExpertSet()
        ).by_layer.items():
            if layer < layers:
                held[index, layer, [expert for expert in ids if expert < experts]] = True
    return held


def replica_loads(expert_load: Floats, held: Bools, replicas: Ints) -> Floats:
    """Returns [D, L]: load of one replica of each deployment; all replicas that hold an expert share its load."""
    table = held.astype(np.float64)
    holders = np.tensordot(replicas, table, axes=1)
    share = np.divide(expert_load, holders, out=np.zeros_like(expert_load), where=holders > 0)
    table *= share
    loads: Floats = table.sum(axis=2)
    return loads


def balancedness(loads: Floats, replicas: Ints) -> float:
    """Returns the mean of the replicas' `loads` [D, L] divided by the maximum, each summed over the layers; 1 is even."""
    heaviest = loads.max(axis=0).sum()
    mean = (loads * replicas[:, None]).sum() / replicas.sum()
    return float(mean / heaviest) if heaviest > 0 else 1.0


def _critical(expert_load: Floats, held: Bools, replicas: Ints) -> float:
    return float(replica_loads(expert_load, held, replicas).max(axis=0).sum())


def _valid(held: Bools, capacities: Sequence[DeploymentCapacity], home: Bools) -> bool:
    """Whether every expert is in a group and the experts of every deployment fit into its memory."""
    fits = all(int(pairs.sum()) <= capacity.experts for pairs, capacity in zip(held, capacities, strict=True))
    return fits and bool(held[home].any(axis=0).all())


def _bins(capacities: Sequence[DeploymentCapacity], layers: int, experts: int) -> Bins:
    strength = np.array([max(capacity.replicas, 1) for capacity in capacities], dtype=np.float64)
    home = np.array([not capacity.hot for capacity in capacities])
    slots = np.array(
        [0 if capacity.hot else min(capacity.experts // layers, experts) for capacity in capacities], dtype=np.int64
    )
    if (fit := int(slots.sum())) < experts:
        short = f"{int(home.sum())} groups have memory for {fit} experts per layer, and the model has {experts}"
        raise ConfigError("memory", fit, short)
    return Bins(np.tile(slots, (layers, 1)), strength, home)


def _deal(slots: Ints, copies: Ints, capacities: Sequence[DeploymentCapacity]) -> Ints:
    """Returns `slots` [L, D] plus up to `copies` [L] slots in hot sets. A slot goes to a hot set with the most memory left."""
    dealt = slots.copy()
    hot = [index for index, capacity in enumerate(capacities) if capacity.hot]
    left = np.array([capacities[index].experts for index in hot])
    for layer in np.argsort(-copies, kind="stable").tolist():
        wanted = int(copies[layer])
        while wanted > 0 and left.any():
            chosen = np.argsort(-left, kind="stable")[: min(wanted, np.count_nonzero(left))]
            left[chosen] -= 1
            dealt[layer, np.array(hot)[chosen]] += 1
            wanted -= len(chosen)
    return dealt


def _nearest(fresh: Packing, empty: Packing, bins: Bins, experts: int, held: Bools) -> Packing:
    """Returns, layer by layer, a packing that starts from `held`, or `fresh` where that is better.

    `fresh` is better if it needs fewer moves, places more copies, or has a lower heaviest load by more than TOLERANCE.
    """
    goal = fresh.load(bins).max(axis=1) * (1.0 + TOLERANCE)
    kept = improve(pack(empty, bins, experts, start=held), bins, experts, target=goal)
    fresh = relabel(fresh, bins, experts, held)
    count = len(bins.strength)
    moves_kept = (kept.held(count, experts) & ~held).sum(axis=(0, 2))
    moves_fresh = (fresh.held(count, experts) & ~held).sum(axis=(0, 2))
    placed = (kept.bin != -1).sum(axis=1) >= (fresh.bin != -1).sum(axis=1)
    good = (kept.load(bins).max(axis=1) <= goal * (1.0 + 1e-9)) & (moves_kept <= moves_fresh) & placed
    return Packing(empty.expert, empty.primary, empty.share, np.where(good[:, None], kept.bin, fresh.bin))


def _compared(
    expert_load: Floats,
    capacities: Sequence[DeploymentCapacity],
    names: tuple[str, ...],
    current: Placement | None,
    before: Bools,
    after: Bools,
    expert_bytes: int,
) -> PlacementPlan:
    replicas = np.array([max(capacity.replicas, 1) for capacity in capacities])
    loads = replica_loads(expert_load, after, replicas)
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
        before=_critical(expert_load, before, replicas),
        after=float(loads.max(axis=0).sum()),
        balancedness=balancedness(loads, replicas),
    )


def _experts(held: Bools) -> ExpertSet:
    """Converts a table `held` [L, E] of one deployment to an ExpertSet."""
    return ExpertSet({layer: frozenset(np.flatnonzero(row).tolist()) for layer, row in enumerate(held) if row.any()})
