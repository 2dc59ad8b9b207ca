"""Lying replicas: each of the lies of `lying_replica.py`, told beside the honest holders of the same experts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from random import Random

from moiety.core.replica import Role
from moiety.core.supervise import supervise
from moiety.registry.interface import HEARTBEAT_S
from moiety.tools.chaos.fault import DidNotHold, Kind, System, described, one_of
from moiety.tools.chaos.lying_replica import HOST, LIES, LyingReplica

LIED_TO_S = 2.0  # longest gap while an honest holder can answer
LASTS_S = 4.0
MOST_DIALS = 40  # of one liar by all routers in LASTS_S: a refuser must not cost a DescribeReplica per call
MOST_CALLS = 400  # likewise


@asynccontextmanager
async def _liar(lie: str, system: System, random: Random) -> AsyncIterator[str]:
    honest = one_of(system, Role.EXPERT, random)
    description = await described(honest)
    description.shared_memory = ""  # routers then send their calls through gRPC
    async with LyingReplica(lie, description) as liar:
        entry = dataclasses.replace(
            honest, id=f"{honest.deployment}#liar-{lie}", address=f"{HOST}:{liar.port}", pid=0, served=0.0
        )

        async def beat() -> None:
            while True:
                await system.registry.register(entry)
                await asyncio.sleep(HEARTBEAT_S)

        beating = supervise("liar's heartbeat", beat)
        try:
            yield f"{entry.id} stands beside {honest.id} and {LIES[lie]}"
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await system.registry.deregister(entry.id)
    if liar.describes > MOST_DIALS:
        raise DidNotHold(f"it was dialled {liar.describes} times in {LASTS_S:g} s, at most {MOST_DIALS} are needed")
    if liar.calls > MOST_CALLS:
        raise DidNotHold(f"it got {liar.calls} calls in {LASTS_S:g} s, although it answered none: at most {MOST_CALLS}")


KINDS = tuple(
    Kind(
        f"liar-{lie}",
        f"a replica beside an honest one {does}",
        "its calls are sent to an honest holder; it is suspected and seldom asked",
        LIED_TO_S,
        partial(_liar, lie),
        lasts_s=LASTS_S,
    )
    for lie, does in LIES.items()
)
