"""Redis in every form of trouble. Services hold on to what they know, because the services themselves are well."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from random import Random

from moiety.errors import FailedPrecondition
from moiety.tools.chaos.fault import Fault, Kind, System
from moiety.tools.chaos.redis_server import RedisServer

NOTICED_S = 1.0  # longest gap: no call waits for Redis
LASTS_S = 20.0  # longer than an entry lives and than the grace of those that read it
DELAY_S = 0.3
SNAPSHOT_S = 10.0


@asynccontextmanager
async def _killed(system: System, _: Random) -> AsyncIterator[str]:
    await system.redis.kill()
    try:
        yield "Redis is killed"
    finally:
        await system.redis.begin()


@asynccontextmanager
async def _stopped(system: System, _: Random) -> AsyncIterator[str]:
    system.redis.signal(signal.SIGSTOP)
    try:
        yield "Redis is stopped"
    finally:
        system.redis.signal(signal.SIGCONT)


@asynccontextmanager
async def _emptied(system: System, _: Random) -> AsyncIterator[str]:
    await system.redis.command("FLUSHALL")
    yield "Redis is emptied"


@asynccontextmanager
async def _configured(values: Mapping[str, str], system: System, _: Random) -> AsyncIterator[str]:
    before = await system.redis.configure(values)
    try:
        yield "Redis has " + ", ".join(f"{name} {value}" for name, value in values.items())
    finally:
        await system.redis.configure(before)


@asynccontextmanager
async def _read_only(system: System, _: Random) -> AsyncIterator[str]:
    """Makes it the replica of a master that does not answer, as after a failover."""
    await system.redis.command("REPLICAOF", "127.0.0.1", "1")
    try:
        yield "Redis is a read-only replica"
    finally:
        await system.redis.command("REPLICAOF", "NO", "ONE")


@asynccontextmanager
async def _cannot_save(system: System, _: Random) -> AsyncIterator[str]:
    """Lets a snapshot fail, after which Redis refuses writes: MISCONF. /proc takes no files."""
    before = await system.redis.configure({"dir": "/proc", "save": "3600 1"})
    await _snapshot(system.redis, "err")
    try:
        yield "Redis cannot save, and refuses writes"
    finally:
        await system.redis.configure({"dir": str(system.folder)})
        await _snapshot(system.redis, "ok")  # which ends the error
        await system.redis.configure(before)


async def _snapshot(redis: RedisServer, ends: str) -> None:
    """Takes a snapshot and waits until its status is `ends`."""
    await redis.command("BGSAVE")
    async with asyncio.timeout(SNAPSHOT_S):
        while f"rdb_last_bgsave_status:{ends}" not in await redis.command("INFO", "persistence"):
            await asyncio.sleep(0.05)


@asynccontextmanager
async def _slow(system: System, _: Random) -> AsyncIterator[str]:
    if (relay := system.redis_relay) is None:
        raise FailedPrecondition("services reach this Redis directly, not through a relay")
    relay.delay_s = DELAY_S / 2
    try:
        yield f"Redis answers {1000 * DELAY_S:g} ms late"
    finally:
        relay.delay_s = 0.0


def _kind(
    name: str, does: str, cause: Callable[[System, Random], Fault], *, lasts_s: float = LASTS_S, on_ray: bool = True
) -> Kind:
    holds = "serving goes on with the services that are known; entries come back"
    return Kind(f"redis-{name}", does, holds, NOTICED_S, cause, lasts_s=lasts_s, on_ray=on_ray)


_FULL = {"maxmemory": "1"}
_EVICTING = {"maxmemory-policy": "allkeys-lru", "maxmemory": "1"}

KINDS = (
    _kind("kill", "kill -9 of Redis, later an empty one on its port", _killed, lasts_s=8.0),
    _kind("stop", "SIGSTOP of Redis, later SIGCONT", _stopped, lasts_s=8.0),
    _kind("flush", "FLUSHALL", _emptied, lasts_s=5.0),
    _kind("full", "out of memory: reads work, writes are refused", partial(_configured, _FULL)),
    _kind("evict", "out of memory with allkeys-lru: entries vanish", partial(_configured, _EVICTING)),
    _kind("readonly", "READONLY, as after a failover", _read_only),
    _kind("misconf", "MISCONF: writes are refused after a failed snapshot", _cannot_save),
    _kind("slow", f"answers {1000 * DELAY_S:g} ms late", _slow, lasts_s=8.0, on_ray=False),
)
