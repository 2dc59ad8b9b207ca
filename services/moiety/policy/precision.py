"""Decides how many bits each expert's weights get, so that a model fits into a memory budget with the least total error."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

from moiety.errors import ConfigError

SHAPE_BYTES = 16  # two int64 beside packed codes
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, order=True)
class Precision:
    """How one expert's matrices are stored: bits per weight, and how many columns (`group`) share a scale.

    `group` 0 means one scale per row at 8 bits and no scales at 16.
    """

    bits: int
    group: int = 0

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f", groups of {self.group}" if self.group else "")

    def bytes_of(self, shape: tuple[int, int], itemsize: int) -> int:
        """Returns the bytes of a stored matrix [O, D]: codes, scales and shape, or `itemsize` bytes per weight at 16 bits."""
        rows, columns = shape
        if self.bits == 16:
            return rows * columns * itemsize
        scales = 4 * rows if self.bits == 8 else 2 * rows * (columns // self.group)
        return rows * columns * self.bits // 8 + scales + SHAPE_BYTES


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store an expert: its bytes and its error."""

    precision: Precision
    nbytes: int
    error: float


@dataclass(frozen=True, slots=True)
class Allocation(Generic[Key]):
    """The option chosen for each expert. `nbytes` and `error` are sums over all experts."""

    chosen: Mapping[Key, Option]

    @property
    def nbytes(self) -> int:
        return sum(option.nbytes for option in self.chosen.values())

    @property
    def error(self) -> float:
        return sum(option.error for option in self.chosen.values())


def allocate(options: Mapping[Key, Sequence[Option]], budget: int) -> Allocation[Key]:
    """Returns an allocation of at most `budget` bytes. Its error exceeds the least possible by at most what the last step adds.

    Every expert starts at its best option and moves down the lower convex hull of (bytes, error). Each step is the one
    with the least additional error per byte saved. Each allocation on this path minimises error + price * bytes for some
    price, so no other allocation with as few bytes has less error (Everett's theorem on Lagrange multipliers; Shoham and
    Gersho 1988 for bit allocation). If the last step saves more than needed, the steps that still fit are undone, largest
    error first. Raises ConfigError if even the smallest options exceed the budget; the message names their sum.
    """
    hulls = {key: _hull(choices) for key, choices in options.items()}
    floor = sum(hull[-1].nbytes for hull in hulls.values())
    if floor > budget:
        raise ConfigError("memory", budget, f"must leave at least {floor} bytes for experts, even at the fewest bits")
    steps = [
        (_slope(upper, lower), position, key)
        for key, hull in hulls.items()
        for position, (upper, lower) in enumerate(pairwise(hull))
    ]
    steps.sort(key=lambda step: step[:1])  # stable: the steps of one hull stay in order
    place = dict.fromkeys(hulls, 0)
    total = sum(hull[0].nbytes for hull in hulls.values())
    for _, position, key in steps:
        if total <= budget:
            break
        total -= hulls[key][position].nbytes - hulls[key][position + 1].nbytes
        place[key] = position + 1
    back = sorted(place, key=lambda key: -_gain(hulls[key], place[key]))
    for key in back:
        while place[key]:
            more = hulls[key][place[key] - 1].nbytes - hulls[key][place[key]].nbytes
            if total + more > budget:
                break
            total += more
            place[key] -= 1
    return Allocation({key: hull[place[key]] for key, hull in hulls.items()})


def _hull(options: Sequence[Option]) -> list[Option]:
    """Returns the options on the lower convex hull, from least error to fewest bytes."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (-option.nbytes, option.error)):
        while hull and option.error <= hull[-1].error:  # no more error, and no more bytes
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(upper: Option, lower: Option) -> float:
    """Returns the additional error per byte saved when an expert is stored as `lower` instead of `upper`."""
    return (lower.error - upper.error) / max(upper.nbytes - lower.nbytes, 1)


def _gain(hull: Sequence[Option], place: int) -> float:
    return hull[place].error - hull[place - 1].error if place else 0.0
