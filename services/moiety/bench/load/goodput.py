"""Goodput: the requests that meet latency targets, such as `ttft:500ms,itl:50ms`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from moiety.errors import InvalidRequest

Measure = Literal["ttft", "itl", "tpot", "e2e"]
MEASURES: tuple[str, ...] = get_args(Measure)
_TARGET = re.compile(rf"({'|'.join(MEASURES)}):(\d+(?:\.\d+)?)(ms|s)")


@dataclass(frozen=True, slots=True)
class Target:
    """The most milliseconds that one measure of a request may take."""

    measure: Measure
    ms: float

    def __str__(self) -> str:
        return f"{self.measure}:{self.ms:g}ms"


def targets(text: str) -> tuple[Target, ...]:
    """Reads targets separated by commas: ttft:500ms,e2e:10s. Raises InvalidRequest, which names the wrong one."""
    found: dict[str, Target] = {}
    for part in text.split(","):
        match = _TARGET.fullmatch(part.strip())
        if match is None or match[1] in found:
            bound = f"MEASURE:TIME, such as ttft:500ms, each measure once; measures: {', '.join(MEASURES)}"
            raise InvalidRequest("goodput", part, bound)
        measure: Measure = match[1]  # type: ignore[assignment]  # the pattern matches nothing else
        found[measure] = Target(measure, float(match[2]) * (1000 if match[3] == "s" else 1))
    return tuple(found.values())


def meets(measured: Mapping[Measure, float | None], wanted: Sequence[Target]) -> bool:
    """Whether a request's measures, in ms, are all within their targets. A measure that it lacks is met.

    An output of one token has no interval between tokens, for example.
    """
    return all((value := measured[target.measure]) is None or value <= target.ms for target in wanted)
