"""The progress of a placement: which replicas have not followed it yet, and waiting until all have."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from moiety.core.replica import Replica, Role
from moiety.errors import Unavailable
from moiety.registry.interface import Registry

POLL_S = 0.1


def unsettled(replicas: Iterable[Replica], epoch: int) -> list[Replica]:
    """Returns the expert replicas that still have experts to load or to drop for the placement of `epoch`."""
    experts = (replica for replica in replicas if replica.role is Role.EXPERT)
    return [replica for replica in experts if replica.placement_epoch < epoch or len(replica.leaving)]


async def until_settled(registry: Registry, epoch: int, timeout_s: float) -> None:
    """Waits until every expert replica has loaded and dropped all experts for the placement of `epoch`.

    Raises Unavailable after `timeout_s`, naming the late replicas.
    """
    late: list[Replica] = []
    try:
        async with asyncio.timeout(timeout_s):
            while late := unsettled(await registry.replicas(), epoch):
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        names = ", ".join(
            f"{replica.id} (epoch {replica.placement_epoch}, leaving {replica.leaving or 'nothing'})"
            for replica in late
        )
        raise Unavailable(f"placement {epoch} is not in force everywhere after {timeout_s:g} s: {names}") from None
