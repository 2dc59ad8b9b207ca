"""Copies of experts and the bins they lie in: the arithmetic of `planner.py`, on all layers at once.

The steps are those of DeepSeek's EPLB (copy the hottest, pack the heaviest first), then what it leaves out: bins of
unequal strength and room, swaps that mend what greedy packing left, and a start from the packing in force.

Legend: L layers, E experts per layer, D bins (deployments), P copies of experts in a layer, padded to the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NOWHERE = -1
USEFUL = 0.5  # of the mean heat of the layer's experts: a copy of a cooler one moves bytes for nothing
STICKY = 1.25  # a copy that exists counts as so much hotter: what is nearly as hot does not replace it
MOST_COPIES = 32  # of one expert
GOOD_ENOUGH = 1.002  # max load over mean: nothing is left to mend
SWAPS = 64  # per layer
LIGHTEST = 12  # bins that a swap may be with
WORTH = 1e-3  # of the heaviest load: a swap that relieves it by less is not made


@dataclass(frozen=True, slots=True)
class Bins:
    """What copies are packed into."""

    slots: Ints  # [L, D] copies that fit
    strength: Floats  # [D] replicas that share a bin's load
    home: Bools  # [D] whether every expert must lie in one of these; the others hold further copies only


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each copy lies."""

    expert: Ints  # [L, P]
    primary: Bools  # [L, P] the copy that must be in a home bin
    share: Floats  # [L, P] the load it brings
    bin: Ints  # [L, P], NOWHERE for padding and for what found no room

    def held(self, bins: int, experts: int) -> Bools:
        """[D, L, E]."""
        layers, copies = np.nonzero(self.bin != NOWHERE)
        held = np.zeros((bins, len(self.bin), experts), dtype=bool)
        held[self.bin[layers, copies], layers, self.expert[layers, copies]] = True
        return held

    def load(self, bins: Bins) -> Floats:
        """[L, D] load of each of a bin's replicas."""
        load = np.zeros(bins.slots.shape)
        layers, copies = np.nonzero(self.bin != NOWHERE)
        np.add.at(load, (layers, self.bin[layers, copies]), self.share[layers, copies])
        return load / bins.strength


def copy_counts(heat: Floats, spare: Ints, held: Ints, limit: int) -> Ints:
    """[L, E] copies of each expert, 1 to `limit`, with up to `spare` [L] more than one each in a layer.

    The next copy goes to the expert with the most heat per copy, as in EPLB, while that is USEFUL. `held` [L, E] is how
    many there are now.
    """
    layers, experts = heat.shape
    most = int(min(spare.max(initial=0) + 1, MOST_COPIES, limit))
    if most <= 1:
        return np.ones((layers, experts), dtype=np.int64)
    flat = _worth(heat, held, most - 1).reshape(layers, -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    taken = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(taken, order, np.arange(flat.shape[1]) < spare[:, None], axis=1)
    taken &= flat > 0
    counts: Ints = 1 + taken.reshape(layers, experts, -1).sum(axis=2)
    return counts


def hottest(heat: Floats, held: Ints, room: int, copies: int) -> Ints:
    """[L] how many of `room` further copies each layer gets, none with more than `copies` of an expert.

    The hottest of all layers together: layers run one after the other, so heat counts alike wherever it is.
    """
    worth = _worth(heat, held, min(copies, MOST_COPIES)).reshape(len(heat), -1)
    if np.count_nonzero(worth) <= room:
        return np.count_nonzero(worth, axis=1).astype(np.int64)
    best = np.argsort(-worth, axis=None, kind="stable")[:room]
    return np.bincount(best // worth.shape[1], minlength=len(heat)).astype(np.int64)


def _worth(heat: Floats, held: Ints, most: int) -> Floats:
    """[L, E, most] heat per copy before a 2nd, 3rd, … one is made; 0 where that is not USEFUL."""
    before = np.arange(1, most + 1)
    worth = heat[:, :, None] / before
    useful = worth > USEFUL * heat.mean(axis=1)[:, None, None]
    worth = np.where(held[:, :, None] > before, STICKY * worth, worth)
    worth = np.minimum.accumulate(worth, axis=2)  # no third copy before the second
    result: Floats = np.where(useful, worth, 0.0)
    return result


def copies_of(heat: Floats, counts: Ints) -> Packing:
    """One entry per copy, heaviest first, none in a bin yet."""
    layers, experts = heat.shape
    shares = heat / counts
    order = np.argsort(-shares, axis=1, kind="stable")
    longest = int(counts.sum(axis=1).max())
    expert = np.zeros((layers, longest), dtype=np.int64)
    primary, valid = np.zeros((layers, longest), dtype=bool), np.zeros((layers, longest), dtype=bool)
    for layer in range(layers):
        repeats = counts[layer, order[layer]]
        total = int(repeats.sum())
        expert[layer, :total] = np.repeat(order[layer], repeats)
        primary[layer, np.cumsum(repeats) - repeats] = True
        valid[layer, :total] = True
    share = np.where(valid, np.take_along_axis(shares, expert, axis=1), 0.0)
    return Packing(np.where(valid, expert, experts), primary, share, np.full(expert.shape, NOWHERE))


def pack(packing: Packing, bins: Bins, experts: int, start: Bools | None = None) -> Packing:
    """Puts every copy that is NOWHERE into the bin where it weighs least, heaviest first.

    Copies that `start` [D, L, E] shows in a bin stay there. A bin never gets an expert twice, and further copies never
    take the last room of a primary one; a copy for which there is no bin is left out.
    """
    layers, width = packing.expert.shape
    count = len(bins.strength)
    rows = np.arange(layers)
    where = np.full((layers, width), NOWHERE)
    held = np.zeros((layers, experts + 1, count), dtype=bool)
    load, used = np.zeros((layers, count)), np.zeros((layers, count), dtype=np.int64)

    def put(copy: int, chosen: Ints, mask: Bools) -> None:
        which, into = rows[mask], chosen[mask]
        where[which, copy] = into
        held[which, packing.expert[which, copy], into] = True
        load[which, into] += packing.share[which, copy]
        used[which, into] += 1

    valid = packing.expert < experts
    if start is not None:
        now = np.zeros((layers, experts + 1, count), dtype=bool)
        now[:, :experts] = start.transpose(1, 2, 0)
        for copy in range(width):
            expert = packing.expert[:, copy]
            stay = now[rows, expert] & ~held[rows, expert] & (used < bins.slots)
            stay &= np.where(packing.primary[:, copy, None], bins.home, True)
            put(copy, np.argmax(stay, axis=1), stay.any(axis=1) & valid[:, copy])
    waiting = (packing.primary & valid & (where == NOWHERE)).sum(axis=1)  # primaries without a place
    for copy in range(width):
        open_ = valid[:, copy] & (where[:, copy] == NOWHERE)
        if not open_.any():
            continue
        first = packing.primary[:, copy]
        free = used < bins.slots
        tight = (np.where(bins.home, bins.slots - used, 0).sum(axis=1) <= waiting) & ~first
        barred = (first[:, None] & ~bins.home) | (tight[:, None] & bins.home)
        allowed = free & ~held[rows, packing.expert[:, copy]] & ~barred
        cost = np.where(allowed, (load + packing.share[:, copy, None]) / bins.strength, np.inf)
        put(copy, np.argmin(cost, axis=1), open_ & allowed.any(axis=1))
        waiting -= open_ & first
    return Packing(packing.expert, packing.primary, packing.share, where)


def mend(packing: Packing, bins: Bins, experts: int, target: Floats | None = None, swaps: int = SWAPS) -> Packing:
    """Takes the swap or move that relieves the heaviest bin of a layer most, until none does.

    A layer is done when its heaviest bin is GOOD_ENOUGH, or at most `target` [L].
    """
    where = packing.bin.copy()
    active = np.arange(len(where))
    used = np.zeros(bins.slots.shape, dtype=np.int64)
    layers, copies = np.nonzero(where != NOWHERE)
    np.add.at(used, (layers, where[layers, copies]), 1)
    held = np.zeros((len(where), experts + 1, len(bins.strength)), dtype=bool)
    held[layers, packing.expert[layers, copies], where[layers, copies]] = True
    load = packing.load(bins) * bins.strength  # absolute
    bound = load.sum(axis=1) / bins.strength.sum() * GOOD_ENOUGH
    if target is not None:
        bound = np.maximum(bound, target)
    for _ in range(swaps):
        active = active[(load[active] / bins.strength).max(axis=1) > bound[active]]
        if not len(active):
            break
        active = active[_relieve(active, packing, bins, where, used, held, load)]
    return Packing(packing.expert, packing.primary, packing.share, where)


def _relieve(active: Ints, packing: Packing, bins: Bins, where: Ints, used: Ints, held: Bools, load: Floats) -> Bools:
    """One swap or move in each of the layers `active` [A], in place; [A] whether there was one that helped."""
    rows, count = np.arange(len(active)), len(bins.strength)
    at, expert, share, primary = where[active], packing.expert[active], packing.share[active], packing.primary[active]
    loads, holds = load[active], held[active]
    heavy = np.argmax(loads / bins.strength, axis=1)  # [A]
    peak = loads[rows, heavy]
    inside = at == heavy[:, None]  # [A, P]
    most = int(inside.sum(axis=1).max())
    mine = np.argsort(~inside, axis=1, kind="stable")[:, :most]  # [A, S] copies in the heavy bin, first
    real = np.take_along_axis(inside, mine, axis=1)
    my_share, my_expert = np.take_along_axis(share, mine, axis=1), np.take_along_axis(expert, mine, axis=1)
    my_primary = np.take_along_axis(primary, mine, axis=1)
    can_go = real[:, :, None] & ~holds[rows[:, None], my_expert] & (bins.home | ~my_primary[:, :, None])  # [A, S, D]
    # Moves to a bin with room: [A, S, D].
    after = np.maximum(
        ((peak[:, None] - my_share) / bins.strength[heavy][:, None])[:, :, None],
        (loads[:, None, :] + my_share[:, :, None]) / bins.strength,
    )
    moves = np.where(can_go & (used[active] < bins.slots[active])[:, None, :], after, np.inf).reshape(len(active), -1)
    # Swaps with a copy in a light bin: [A, S, C].
    there = np.where(at == NOWHERE, 0, at)
    ranked = loads / bins.strength
    light = ranked <= np.sort(ranked, axis=1)[:, min(LIGHTEST, count) - 1, None]
    comes = (at != NOWHERE) & ~inside & light[rows[:, None], there]
    comes &= ~holds[rows[:, None], expert, heavy[:, None]] & (bins.home[heavy][:, None] | ~primary)
    width = max(int(comes.sum(axis=1).max()), 1)
    partners = np.argsort(~comes, axis=1, kind="stable")[:, :width]  # [A, C]
    comes, there = np.take_along_axis(comes, partners, axis=1), np.take_along_axis(there, partners, axis=1)
    its_share = np.take_along_axis(share, partners, axis=1)
    swaps = np.maximum(
        (peak[:, None, None] - my_share[:, :, None] + its_share[:, None, :]) / bins.strength[heavy][:, None, None],
        (np.take_along_axis(loads, there, axis=1)[:, None, :] + my_share[:, :, None] - its_share[:, None, :])
        / bins.strength[there][:, None, :],
    )
    can_swap = np.take_along_axis(can_go, np.broadcast_to(there[:, None, :], swaps.shape), axis=2) & comes[:, None, :]
    swaps = np.where(can_swap, swaps, np.inf).reshape(len(active), -1)
    move, swap = np.argmin(moves, axis=1), np.argmin(swaps, axis=1)
    by_move, by_swap = moves[rows, move], swaps[rows, swap]
    helped = np.minimum(by_move, by_swap) < peak / bins.strength[heavy] * (1 - WORTH)
    layer, source = active[helped], heavy[helped]
    swapping = (by_swap < by_move)[helped]
    chosen, other = np.divmod(np.where(swapping, swap[helped], move[helped]), np.where(swapping, width, count))
    copy = mine[helped, chosen]
    other = np.where(swapping, partners[helped, np.where(swapping, other, 0)], other)  # a copy, or a bin
    target = np.where(swapping, where[layer, np.where(swapping, other, 0)], other)
    _transfer(packing, where, used, held, load, layer, copy, source, target)
    back = swapping.nonzero()[0]
    _transfer(packing, where, used, held, load, layer[back], other[back], target[back], source[back])
    return helped


def _transfer(
    packing: Packing,
    where: Ints,
    used: Ints,
    held: Bools,
    load: Floats,
    layer: Ints,
    copy: Ints,
    source: Ints,
    target: Ints,
) -> None:
    """Moves one `copy` of each `layer` (all different) from bin `source` to bin `target`, in place."""
    expert, share = packing.expert[layer, copy], packing.share[layer, copy]
    where[layer, copy] = target
    held[layer, expert, source], held[layer, expert, target] = False, True
    used[layer, source] -= 1
    used[layer, target] += 1
    load[layer, source] -= share
    load[layer, target] += share


def relabel(packing: Packing, bins: Bins, experts: int, current: Bools) -> Packing:
    """The same packing with like bins renamed, layer by layer, so that most copies are where `current` [D, L, E] is."""
    count, layers = len(bins.strength), len(packing.bin)
    new = packing.held(count, experts).transpose(1, 0, 2).astype(np.float32)  # [L, D, E]
    overlap = new @ current.transpose(1, 2, 0).astype(np.float32)  # [L, new, old]
    like = (bins.strength[:, None] == bins.strength) & (bins.home[:, None] == bins.home)
    same_room = bins.slots[:, :, None] == bins.slots[:, None, :]
    overlap = np.where(like & same_room, overlap + 1.0, 0.0)
    name = np.tile(np.arange(count), (layers, 1))
    rows = np.arange(layers)
    taken = np.zeros((layers, count), dtype=bool)
    for _ in range(count):
        best = np.argmax(overlap.reshape(layers, -1), axis=1)
        bin_, label = np.divmod(best, count)
        found = overlap[rows, bin_, label] > 0
        which = rows[found]
        name[which, bin_[found]] = label[found]
        taken[which, label[found]] = True
        overlap[which, bin_[found], :] = 0.0
        overlap[which, :, label[found]] = 0.0
    named = np.where(packing.bin == NOWHERE, NOWHERE, np.take_along_axis(name, np.maximum(packing.bin, 0), axis=1))
    return Packing(packing.expert, packing.primary, packing.share, named)
