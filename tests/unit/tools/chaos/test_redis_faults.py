"""Redis in trouble, on a real server: each fault refuses what it says, and leaves a server that takes writes again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest

from moiety.errors import FailedPrecondition
from moiety.tools.chaos import redis_faults
from moiety.tools.chaos.fault import System
from moiety.tools.chaos.redis_server import RedisServer

REFUSALS = {"redis-full": "OOM", "redis-readonly": "READONLY", "redis-misconf": "MISCONF"}


@pytest.fixture
def system(tmp_path: Path) -> AsyncIterator[System]:
    """Returns as much of a system as these faults need: a Redis with one key."""
    with RedisServer() as redis:
        yield cast("System", SimpleNamespace(redis=redis, redis_relay=None, folder=tmp_path))


@pytest.mark.parametrize("name", REFUSALS)
async def test_writes_are_refused_while_reads_work(system: System, name: str):
    """While the fault lasts, a write is refused with Redis's own error and a read works; afterwards a write works."""
    (kind,) = (kind for kind in redis_faults.KINDS if kind.name == name)
    await system.redis.command("SET", "before", "1")
    async with kind.cause(system, Random(0)):
        with pytest.raises(FailedPrecondition, match=REFUSALS[name]):
            await system.redis.command("SET", "during", "1")
        assert await system.redis.command("GET", "before") == "1"
    assert await system.redis.command("SET", "after", "1") == "OK"


async def test_a_killed_server_comes_back_empty_on_its_port(system: System):
    """kill -9 and a new server: the port is the same, the keys are gone."""
    (kind,) = (kind for kind in redis_faults.KINDS if kind.name == "redis-kill")
    await system.redis.command("SET", "before", "1")
    port = system.redis.port
    async with kind.cause(system, Random(0)):
        with pytest.raises(ConnectionRefusedError):
            await system.redis.command("PING")
    assert system.redis.port == port
    assert await system.redis.keys() == 0
