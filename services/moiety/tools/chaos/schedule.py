"""Which fault comes when: a pure function of the seed and the kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from moiety.tools.chaos.fault import Kind

STRIKE_TOKENS = (10, 60)  # how many tokens every stream has when a fault begins: at least, at most


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault of the schedule."""

    kind: Kind
    strike_at: int  # tokens that every stream has when the fault begins
    seed: int  # of the choice of its victim


def schedule(seed: int, kinds: Sequence[Kind]) -> Iterator[Planned]:
    """Yields faults without end. Each round has one kind of every family, and each family takes turns among its kinds.

    So a short run has a fault of every family, however many kinds a family has.
    """
    random = Random(seed)
    families: dict[str, list[Kind]] = {}
    for kind in kinds:
        families.setdefault(kind.family, []).append(kind)
    for members in families.values():
        random.shuffle(members)
    turn = 0
    while families:
        order = list(families.values())
        random.shuffle(order)
        for members in order:
            yield Planned(members[turn % len(members)], random.randint(*STRIKE_TOKENS), random.getrandbits(32))
        turn += 1
