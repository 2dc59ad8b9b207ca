"""Packs copies of experts into bins (deployments): the arithmetic of `planner.py`, on all layers at once.

The first steps are those of DeepSeek's EPLB: copy the hottest experts, pack the heaviest copies first. Beyond EPLB, bins may
differ in strength and slots, swaps improve the greedy packing, and packing may start from the placement in force.

Legend: L layers, E experts per layer, D bins (deployments), P copies of experts in a layer (padded to the layer with most).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NOWHERE = -1
USEFUL = 0.5  # fraction of the layer's mean expert load: a copy that would carry less is not worth its bytes
STICKY = 1.25  # load factor of a copy that exists, so that a slightly hotter expert does not replace it
MOST_COPIES = 32  # of one expert
GOOD_ENOUGH = 1.002  # max load over mean load at which a layer counts as balanced
SWAPS = 64  # per layer
LIGHTEST = 12  # number of lightest bins that a swap may use
WORTH = 1e-3  # fraction of the heaviest load: a swap that relieves it by less is not made


@dataclass(frozen=True, slots=True)
class Bins:
    """The bins that copies are packed into."""

    slots: Ints  # [L, D] copies that fit
    strength: Floats  # [D] replicas that share a bin's load
    home: Bools  # [D] home bins (groups) hold every expert once between them; the others hold further copies only


@dataclass(frozen=True, slots=True)
class Packing:
    """Copies of experts, and the bin that each of them is in."""

    expert: Ints  # [L, P]
    primary: Bools  # [L, P] the one copy of its expert that must be in a home bin
    share: Floats  # [L, P] the load it brings
    bin: Ints  # [L, P], NOWHERE for padding and for copies without a free slot

    def held(self, bins: int, experts: int) -> Bools:
        """Returns [D, L, E]: whether a bin holds an expert."""
        layers, copies = np.nonzero(self.bin != NOWHERE)
        held = np.zeros((bins, len(self.bin), experts), dtype=bool)
        held[self.bin[layers, copies], layers, self.expert[layers, copies]] = True
        return held

    def load(self, bins: Bins) -> Floats:
        """Returns [L, D]: the load of a bin, divided by the number of replicas that share it."""
        load = np.zeros(bins.slots.shape)
        layers, copies = np.nonzero(self.bin != NOWHERE)
        np.add.at(load, (layers, self.bin[layers, copies]), self.share[layers, copies])
        return load / bins.strength


def copy_counts(expert_load: Floats, spare: Ints, held: Ints, limit: int) -> Ints:
    """Returns [L, E]: copies of each expert, 1 to `limit`, with up to `spare` [L] further copies per layer.

    As in EPLB, the next copy goes to the expert with the most load per copy, as long as that load is above USEFUL times the
    layer's mean. `held` [L, E]: copies that exist now. For a copy that exists, the load per copy counts STICKY times.
    """
    layers, experts = expert_load.shape
    most = int(min(spare.max(initial=0) + 1, MOST_COPIES, limit))
    if most <= 1:
        return np.ones((layers, experts), dtype=np.int64)
    flat = _worth(expert_load, held, most - 1).reshape(layers, -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    taken = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(taken, order, np.arange(flat.shape[1]) < spare[:, None], axis=1)
    taken &= flat > 0
    counts: Ints = 1 + taken.reshape(layers, experts, -1).sum(axis=2)
    return counts


def hot_copies_per_layer(expert_load: Floats, held: Ints, places: int, copies: int) -> Ints:
    """Returns [L]: how many of `places` further copies each layer gets, with at most `copies` further copies of an expert.

    Picks the copies with the most load over all layers together: layers run one after the other, so load counts the same
    in each of them.
    """
    worth = _worth(expert_load, held, min(copies, MOST_COPIES)).reshape(len(expert_load), -1)
    if np.count_nonzero(worth) <= places:
        return np.count_nonzero(worth, axis=1).astype(np.int64)
    best = np.argsort(-worth, axis=None, kind="stable")[:places]
    return np.bincount(best // worth.shape[1], minlength=len(expert_load)).astype(np.int64)


def _worth(expert_load: Floats, held: Ints, most: int) -> Floats:
    """Returns [L, E, most]: load per copy before the 2nd, 3rd, … copy is made; 0 if the copy is not USEFUL.

    If the copy exists already, its load counts STICKY times.
    """
    before = np.arange(1, most + 1)
    worth = expert_load[:, :, None] / before
    useful = worth > USEFUL * expert_load.mean(axis=1)[:, None, None]
    worth = np.where(held[:, :, None] > before, STICKY * worth, worth)
    worth = np.minimum.accumulate(worth, axis=2)  # no third copy before the second
    result: Floats = np.where(useful, worth, 0.0)
    return result


def copies_of(expert_load: Floats, counts: Ints) -> Packing:
    """Returns a packing with one entry per copy, heaviest first. No copy is in a bin yet."""
    layers, experts = expert_load.shape
    shares = expert_load / counts
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
    """Puts every copy, heaviest first, into the bin that has the lowest load per replica with this copy in it.

    First, each copy of an expert that a bin holds in `start` [D, L, E] is put there, if the bin has a free slot.
    Primary copies go into home bins only. A bin never gets an expert twice, and further copies never take the last slot
    that a primary copy needs. A copy without a possible bin is NOWHERE.
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
    waiting = (packing.primary & valid & (where == NOWHERE)).sum(axis=1)  # primary copies without a bin
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


def improve(packing: Packing, bins: Bins, experts: int, target: Floats | None = None, swaps: int = SWAPS) -> Packing:
    """Makes up to `swaps` swaps or moves per layer, each time the best found for the layer's heaviest bin.

    A layer is done when no swap or move relieves this bin by more than the fraction WORTH, or when the load per
    replica of this bin is at most GOOD_ENOUGH times the mean, or at most `target` [L].
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
    """Makes the best move or swap in each layer of `active` [A], in place, if that helps. Returns [A]: whether it did."""
    rows, count = np.arange(len(active)), len(bins.strength)
    at, expert, share, primary = where[active], packing.expert[active], packing.share[active], packing.primary[active]
    loads, holds = load[active], held[active]
    heavy = np.argmax(loads / bins.strength, axis=1)  # [A]
    peak = loads[rows, heavy]
    inside = at == heavy[:, None]  # [A, P]
    most = int(inside.sum(axis=1).max())
    inner = np.argsort(~inside, axis=1, kind="stable")[:, :most]  # [A, S] the copies in the heavy bin
    real = np.take_along_axis(inside, inner, axis=1)
    inner_share, inner_expert = np.take_along_axis(share, inner, axis=1), np.take_along_axis(expert, inner, axis=1)
    inner_primary = np.take_along_axis(primary, inner, axis=1)
    # Whether a copy may go to a bin: [A, S, D].
    can_go = real[:, :, None] & ~holds[rows[:, None], inner_expert] & (bins.home | ~inner_primary[:, :, None])
    # Moves to a bin with a free slot: [A, S, D].
    after = np.maximum(
        ((peak[:, None] - inner_share) / bins.strength[heavy][:, None])[:, :, None],
        (loads[:, None, :] + inner_share[:, :, None]) / bins.strength,
    )
    moves = np.where(can_go & (used[active] < bins.slots[active])[:, None, :], after, np.inf).reshape(len(active), -1)
    # Swaps with a copy in a light bin: [A, S, C].
    outer = np.where(at == NOWHERE, 0, at)  # the bin of each copy
    ranked = loads / bins.strength
    light = ranked <= np.sort(ranked, axis=1)[:, min(LIGHTEST, count) - 1, None]
    fits = (at != NOWHERE) & ~inside & light[rows[:, None], outer]
    fits &= ~holds[rows[:, None], expert, heavy[:, None]] & (bins.home[heavy][:, None] | ~primary)
    width = max(int(fits.sum(axis=1).max()), 1)
    partners = np.argsort(~fits, axis=1, kind="stable")[:, :width]  # [A, C] copies that fit into the heavy bin
    fits, outer = np.take_along_axis(fits, partners, axis=1), np.take_along_axis(outer, partners, axis=1)
    outer_share = np.take_along_axis(share, partners, axis=1)
    swaps = np.maximum(
        (peak[:, None, None] - inner_share[:, :, None] + outer_share[:, None, :]) / bins.strength[heavy][:, None, None],
        (np.take_along_axis(loads, outer, axis=1)[:, None, :] + inner_share[:, :, None] - outer_share[:, None, :])
        / bins.strength[outer][:, None, :],
    )
    can_swap = np.take_along_axis(can_go, np.broadcast_to(outer[:, None, :], swaps.shape), axis=2) & fits[:, None, :]
    swaps = np.where(can_swap, swaps, np.inf).reshape(len(active), -1)
    move, swap = np.argmin(moves, axis=1), np.argmin(swaps, axis=1)
    by_move, by_swap = moves[rows, move], swaps[rows, swap]
    helped = np.minimum(by_move, by_swap) < peak / bins.strength[heavy] * (1 - WORTH)
    layer, source = active[helped], heavy[helped]
    swapping = (by_swap < by_move)[helped]
    chosen, other = np.divmod(np.where(swapping, swap[helped], move[helped]), np.where(swapping, width, count))
    copy = inner[helped, chosen]
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
    """Moves one `copy` in each `layer` from bin `source` to bin `target`, in place. No layer may occur twice."""
    expert, share = packing.expert[layer, copy], packing.share[layer, copy]
    where[layer, copy] = target
    held[layer, expert, source], held[layer, expert, target] = False, True
    used[layer, source] -= 1
    used[layer, target] += 1
    load[layer, source] -= share
    load[layer, target] += share


def relabel(packing: Packing, bins: Bins, experts: int, current: Bools) -> Packing:
    """Renames interchangeable bins, layer by layer, so that most copies are where `current` [D, L, E] has them."""
    count, layers = len(bins.strength), len(packing.bin)
    new = packing.held(count, experts).transpose(1, 0, 2).astype(np.float32)  # [L, D, E]
    overlap = new @ current.transpose(1, 2, 0).astype(np.float32)  # [L, new, old]
    alike = (bins.strength[:, None] == bins.strength) & (bins.home[:, None] == bins.home)
    same_slots = bins.slots[:, :, None] == bins.slots[:, None, :]
    overlap = np.where(alike & same_slots, overlap + 1.0, 0.0)
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
