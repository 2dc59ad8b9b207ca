"""What a config must state of its rotary positions, by their kind. Imports no torch.

The fields of each kind are those that transformers computes its rotations from (modeling_rope_utils.py). Their bounds are wider
than anything published, and narrow enough that no rotation overflows float32 or divides by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moiety.core.text import did_you_mean
from moiety.errors import CheckpointError
from moiety.model.checkpoint.bounds import Bound, between, check_fields, whole

ORIGINAL = "original_max_position_embeddings"
_FACTOR, _OR_NONE = between(1e-6, 1e6), between(0, 1e6)
_FACTORS = Bound(
    lambda value: isinstance(value, list) and all(map(_FACTOR.holds, value)), f"a list of numbers, each {_FACTOR.words}"
)
# The fields that any kind may state, also beside the rope.
SHARED: Mapping[str, Bound] = MappingProxyType(
    {
        "rope_theta": between(1, 1e18, low_too=False),  # its logarithm is a divisor
        ORIGINAL: whole(2),  # likewise
        "partial_rotary_factor": between(0, 1),
    }
)
_YARN = {
    "attention_factor": _FACTOR,
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _OR_NONE),  # 0: the default
}
# Kind -> the fields that it must state, and those that it may state.
KINDS: Mapping[str, tuple[Mapping[str, Bound], Mapping[str, Bound]]] = MappingProxyType(
    {
        "default": ({}, {}),
        "linear": ({"factor": _FACTOR}, {}),
        "dynamic": ({"factor": _FACTOR}, {"alpha": _FACTOR}),
        "yarn": ({"factor": _FACTOR}, _YARN),
        "llama3": (dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _FACTOR), {}),
        "longrope": (
            dict.fromkeys(("short_factor", "long_factor"), _FACTORS),
            dict.fromkeys(("factor", "attention_factor", "short_mscale", "long_mscale"), _FACTOR),
        ),
        "proportional": ({}, {"factor": _FACTOR}),
    }
)
_RENAMED = {"su": "longrope"}
_TYPE = Bound(lambda value: isinstance(value, str), "a string")


def check_rope(file: Path, rope: Mapping[str, Any], within: str) -> None:
    """Raises CheckpointError unless a rope, or each of those that it nests by kind of layer, states what its kind needs.

    `within`: what precedes the names of its fields, such as "rope_scaling.". Kinds that KINDS lacks pass: transformers reads
    some of them as another one.
    """
    nested = {name: part for name, part in rope.items() if isinstance(part, dict)}
    for name, part in nested.items():
        check_rope(file, part, f"{within}{name}.")
    check_fields(file, rope, {"rope_type": _TYPE, "type": _TYPE, **SHARED}, within)
    needed, further = KINDS.get(kind := kind_of(rope), ({}, {}))
    check_fields(file, rope, {**needed, **further}, within)
    for name, needs in needed.items():
        if rope.get(name) is None:
            what = "null" if name in rope else "missing"
            raise CheckpointError(f"{file}: {within}{name} is {what}: a rope of the kind {kind} needs {needs.words}")


def check_served(file: Path, rope: Mapping[str, Any], within: str, pairs: Callable[[], int | None]) -> None:
    """Raises CheckpointError if transformers cannot compute a rope that it has read from `file`.

    `within`: what precedes the names of its fields there. `pairs` returns how many pairs of elements rotate in a head; None
    where heads differ.
    """
    check_rope(file, rope, within)
    if rope and rope.get("rope_theta") is None:
        raise CheckpointError(f"{file}: rope_theta is null: must be {SHARED['rope_theta'].words}")
    kind = kind_of(rope)
    if kind not in KINDS:
        near = f"; {kind} is the earlier name of {_RENAMED[kind]}" if kind in _RENAMED else did_you_mean(kind, KINDS)
        raise CheckpointError(f"{file}: its rope_type is {kind!r}: must be one of {', '.join(sorted(KINDS))}{near}")
    count = pairs() if kind == "longrope" else None
    for name in ("short_factor", "long_factor") if count is not None else ():
        if (found := len(rope[name])) != count:
            bound = f"must have {count}, one for each pair of elements that rotates in a head"
            raise CheckpointError(f"{file}: {within}{name} has {found} numbers: {bound}")


def kind_of(rope: Mapping[str, Any]) -> str:
    """Returns the kind of rotary positions that a rope states."""
    return str(rope.get("rope_type", rope.get("type", "default")))
