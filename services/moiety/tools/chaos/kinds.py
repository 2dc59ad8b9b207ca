"""All kinds of faults, by family, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.errors import ConfigError
from moiety.tools.chaos import (
    device_faults,
    liar_faults,
    machine_faults,
    network_faults,
    partition,
    process_faults,
    redis_faults,
)
from moiety.tools.chaos.fault import Kind

KINDS: tuple[Kind, ...] = (
    *process_faults.KINDS,
    *device_faults.KINDS,
    *liar_faults.KINDS,
    *network_faults.KINDS,
    *partition.KINDS,
    *redis_faults.KINDS,
    *machine_faults.KINDS,
)


def chosen(names: Sequence[str], *, ray: bool) -> tuple[Kind, ...]:
    """Returns the kinds with these names or of these families; all, if none is named. `ray`: only those possible on Ray.

    Raises ConfigError for a name that is neither, or if no kind is left.
    """
    families = {kind.family for kind in KINDS}
    for name in names:
        if name not in families and all(name != kind.name for kind in KINDS):
            raise ConfigError(
                "only", name, f"must be a kind that --list shows, or one of {', '.join(sorted(families))}"
            )
    kinds = tuple(
        kind for kind in KINDS if (kind.on_ray or not ray) and (not names or {kind.name, kind.family} & {*names})
    )
    if not kinds:
        raise ConfigError("only", ",".join(names), "none of them is possible on Ray; --list says which are")
    return kinds
