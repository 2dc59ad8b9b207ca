"""Bounds of fields of JSON files, and the error for a field that is outside of its own. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiety.errors import CheckpointError, shown

MAX_COUNT = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Bound:
    """What a field must hold where it is not null: a test, and the words that follow "must be" in the error."""

    holds: Callable[[Any], bool]
    words: str


def integer(low: int, high: int = MAX_COUNT) -> Bound:
    """Returns the bound of an integer from `low` to `high`."""
    return Bound(lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}")


def each(bound: Bound) -> Bound:
    """Returns the bound of a value that may also be a list with one value for each layer."""

    def holds(value: Any) -> bool:
        return all(map(bound.holds, value)) if isinstance(value, list) else bound.holds(value)

    return Bound(holds, f"{bound.words}, or a list of such")


def whole(low: int) -> Bound:
    """Returns the bound of an integer of at least `low`, which may be written with a decimal point."""
    return Bound(
        lambda value: _is_number(value) and low <= value <= MAX_COUNT and value == int(value),
        f"an integer from {low} to {MAX_COUNT}",
    )


def between(low: float, high: float, *, low_too: bool = True) -> Bound:
    """Returns the bound of a number from `low`, or above it if `low_too` is false, to `high`."""

    def holds(value: Any) -> bool:
        return _is_number(value) and (low <= value if low_too else low < value) and value <= high

    least, most = (re.sub(r"e([+-]?)0*", r"e\1", f"{number:g}").replace("e+", "e") for number in (low, high))
    return Bound(holds, f"a number from {least} to {most}" if low_too else f"a number above {least} and at most {most}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_fields(file: Path, stated: Mapping[str, Any], bounds: Mapping[str, Bound], within: str = "") -> None:
    """Raises CheckpointError if a field of `stated` is neither null nor within its bound. `within`: what precedes its name."""
    for name, bound in bounds.items():
        value = stated.get(name)
        if value is not None and not bound.holds(value):
            raise CheckpointError(f"{file}: {within}{name} = {shown(value)}: must be {bound.words}")
