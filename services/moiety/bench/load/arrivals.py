"""When requests arrive in an open loop. Pure: the random numbers come from the caller's generator."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random
from typing import Literal, get_args

Arrivals = Literal["poisson", "constant", "gamma"]
ARRIVALS: tuple[str, ...] = get_args(Arrivals)


def arrival_times(arrivals: Arrivals, per_s: float, burstiness: float, random: Random) -> Iterator[float]:
    """Yields times of arrival without end, in seconds from the start, `per_s` of them a second on average.

    `poisson`: independent users. `constant`: even intervals. `gamma`: intervals with shape `burstiness`, which below 1
    makes bursts, is Poisson at 1, and approaches even intervals above (as the option of that name of vLLM's benchmark).
    """
    if arrivals == "constant":
        yield from (number / per_s for number in count())
        return
    shape = burstiness if arrivals == "gamma" else 1.0
    at = 0.0
    while True:
        at += random.gammavariate(shape, 1 / (shape * per_s))
        yield at
