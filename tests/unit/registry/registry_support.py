"""Values, waits and registries shared by the tests of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from moiety.core.experts import ExpertSet
from moiety.core.load import ExpertDemand
from moiety.core.replica import Replica, Role
from moiety.registry.redis import RedisRegistry
from moiety.testing import fake_system


def expert_replica(replica_id: str = "e0", **changes: object) -> Replica:
    """A ready expert replica that holds two experts in three layers."""
    values: dict[str, object] = {
        "id": replica_id,
        "role": Role.EXPERT,
        "deployment": "experts-0",
        "address": "127.0.0.1:4000",
        "node": "node-a",
        "model": "tiny",
        "revision": "abc",
        "held": ExpertSet.uniform(3, [0, 5]),
        "placement_epoch": 2,
        "started": 1700000000.25,
        "pid": 42,
    }
    return Replica(**{**values, **changes})  # type: ignore[arg-type]


def demand_of(*rows: tuple[int, ...], time: float = 0.0, started: float = 0.0) -> ExpertDemand:
    """Returns counters with `rows` per layer and equal activations."""
    return ExpertDemand(rows=rows, activations=rows, time=time, started=started)


def prefix_of(app: str) -> str:
    """Returns what the keys of `opened(url, app)` begin with."""
    return f"moiety:{{{app}}}:{fake_system(app=app).key}:"


@contextlib.asynccontextmanager
async def opened(url: str, app: str) -> AsyncIterator[RedisRegistry]:
    """Yields a registry in Redis, and closes it at the end."""
    registry = RedisRegistry(url, fake_system(app=app))
    try:
        yield registry
    finally:
        await registry.close()


async def eventually(condition: Callable[[], Awaitable[bool]], within_s: float = 20.0) -> None:
    """Waits until `condition` holds; fails after `within_s` seconds."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < within_s, f"{condition} did not come true within {within_s} s"
        await asyncio.sleep(0.02)
