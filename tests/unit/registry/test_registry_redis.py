"""What only a real Redis does: it expires entries, stops, hangs, and holds entries that are broken."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import redis
from registry_support import demand_of, expert_replica, opened, prefix_of

from moiety.core.experts import ExpertSet
from moiety.core.load import ReplicaLoad
from moiety.core.replica import Placement
from moiety.errors import ConfigError, RegistryUnreachable
from moiety.registry.connect import connect
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import DEMAND_TTL_S, LOAD_TTL_S, MISSING_EXPERTS_TTL_S, TTL_S, Registry
from moiety.registry.listing import digest_of
from moiety.testing import SYSTEM, fake_system


async def test_entries_expire_each_after_its_time(
    redis_server: EmbeddedRedis, app: str, redis_cli: redis.Redis
) -> None:
    """A replica expires 3 s after its last beat, load reports and missing experts after 5 s, and the sets are pruned."""
    async with opened(redis_server.url, app) as registry:
        await registry.register(expert_replica())
        await registry.publish_load("e0", ReplicaLoad(0.5, 1.0, 2.0, 3.0))
        await registry.report_missing_experts(1, [2])
        beat, busy, missing = (f"{prefix_of(app)}{key}" for key in ("beat:e0", "busy:e0", "missing"))
        seconds, microseconds = redis_cli.time()
        assert TTL_S - 2 < redis_cli.pttl(beat) / 1e3 <= TTL_S
        assert LOAD_TTL_S - 2 < redis_cli.pttl(busy) / 1e3 <= LOAD_TTL_S
        expiry = redis_cli.zscore(missing, "1/2") / 1e3
        assert MISSING_EXPERTS_TTL_S - 2 < expiry - seconds - microseconds / 1e6 <= MISSING_EXPERTS_TTL_S
        redis_cli.pexpire(beat, 0)
        assert await registry.replicas() == ()
        assert await registry.replica_load()
        assert await registry.missing_experts()
        redis_cli.pexpire(busy, 0)
        redis_cli.zadd(missing, {"1/2": seconds * 1000})
        assert await registry.replica_load() == {}
        assert await registry.missing_experts() == {}
    assert redis_cli.keys(f"{prefix_of(app)}*") == [f"{prefix_of(app)}generation"]


async def test_counters_outlive_a_slow_writer(redis_server: EmbeddedRedis, app: str, redis_cli: redis.Redis) -> None:
    """A writer's counters stay for a minute after its last flush and leave no trace; its hot experts expire earlier."""
    load, hot = f"{prefix_of(app)}load:router-a", f"{prefix_of(app)}hot"
    async with opened(redis_server.url, app) as registry:
        for second in (0, 1):
            await registry.publish_load("router-a", demand=demand_of((second, 2 * second), time=second))
    assert DEMAND_TTL_S - 5 < redis_cli.ttl(load) <= DEMAND_TTL_S
    assert all(0 < redis_cli.ttl(key) <= LOAD_TTL_S for key in (hot, f"{hot}:router-a"))
    redis_cli.delete(load)
    async with opened(redis_server.url, app) as registry:
        assert await registry.expert_demand() == {}
    assert redis_cli.scard(f"{prefix_of(app)}writers") == 0


async def test_hot_lists_the_current_rates_of_the_hottest_experts(
    redis_server: EmbeddedRedis, app: str, redis_cli: redis.Redis
) -> None:
    """`hot` has 64 rates, summed over writers; a repeated flush counts once, and old rows do not count."""
    wide, hot = tuple(range(100)), f"{prefix_of(app)}hot"
    async with opened(redis_server.url, app) as registry:
        for second in (0, 2, 2):
            rows = tuple(1000 + second * count for count in wide)
            mine = demand_of(rows, (0,) * 100, time=float(second))
            other = demand_of((0,) * 99 + (second,), (0, 500 * second, *(0,) * 98), time=9.0 + second)
            await registry.publish_load("router-a", demand=mine)
            await registry.publish_load("router-b", demand=other)
        listed = redis_cli.zrevrange(hot, 0, -1, withscores=True)
        assert listed[:3] == [("1/1", 500.0), ("0/99", 100.0), ("0/98", 98.0)]
        assert len(listed) == 64
        await registry.publish_load("router-a", demand=demand_of(rows, (0,) * 100, time=5.0))
        assert redis_cli.zrevrange(hot, 0, -1, withscores=True) == [("1/1", 500.0), ("0/99", 1.0)]
        await registry.publish_load("router-b", demand=replace(other, time=14.0))
        assert not redis_cli.exists(hot)


async def test_broken_entries_are_skipped_with_one_warning(
    redis_server: EmbeddedRedis, app: str, redis_cli: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken entry does not hide the good ones, and is logged once, by name and field."""
    key = prefix_of(app)
    broken = {
        "not-json": "{",
        "list": "[]",
        "no-address": '{"id": "x"}',
        "role": '{"id": "role", "role": "chef"}',
        "utf-8": b"\xff\xfe",
    }
    for name, text in broken.items():
        redis_cli.set(f"{key}replica:{name}", text)
        redis_cli.set(f"{key}beat:{name}", digest_of(text))
        redis_cli.sadd(f"{key}replicas", name)
    redis_cli.lpush(f"{key}replica:list-key", "x")
    redis_cli.lpush(f"{key}beat:list-beat", "x")
    redis_cli.mset({f"{key}beat:list-key": "x", f"{key}replica:list-beat": "x"})
    redis_cli.sadd(f"{key}replicas", "list-key", "list-beat")
    redis_cli.set(f"{key}busy:e1", '{"busy": "very"}')
    redis_cli.set(f"{key}busy:e2", '{"busy": NaN}')
    redis_cli.sadd(f"{key}reporters", "e1", "e2")
    redis_cli.hset(f"{key}load:r1", mapping={"layers": 1, "experts": 9, "time": 1, "rows": b"x", "activations": b"x"})
    redis_cli.set(f"{key}load:r2", "not a hash")
    redis_cli.sadd(f"{key}writers", "r1", "r2")
    redis_cli.zadd(f"{key}missing", {"one/two": 9e15})
    redis_cli.set(f"{key}placement", '{"epoch": 4}')
    redis_cli.xadd(f"{key}decisions", {"json": "{"})
    with caplog.at_level(logging.WARNING):
        async with opened(redis_server.url, app) as registry:
            await registry.register(expert_replica())
            await registry.publish_load("r0", demand=demand_of((1,)))
            await registry.record_decision({"target": 2})
            for _ in range(2):
                assert await registry.replicas() == (expert_replica(),)
                assert await registry.replica_load() == {}
                assert await registry.expert_demand() == {"r0": demand_of((1,))}
                assert await registry.missing_experts() == {}
                assert await registry.placement() is None
                assert await registry.decisions() == [{"target": 2}]
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == len(set(warned)) == len(broken) + 2 + 2 + 1 + 1 + 1
    assert any("replica:role " in message and "field role = 'chef'" in message for message in warned)


async def test_fields_of_a_newer_version_are_ignored(
    redis_server: EmbeddedRedis, app: str, redis_cli: redis.Redis
) -> None:
    """An entry with unknown fields is read without these."""
    async with opened(redis_server.url, app) as registry:
        await registry.register(expert_replica())
        key = f"{prefix_of(app)}replica:e0"
        redis_cli.set(key, redis_cli.get(key).replace("{", '{"colour": ["blue"], ', 1), keepttl=True)
        assert await registry.replicas() == (expert_replica(),)


async def test_a_redis_that_stops_is_unreachable_and_comes_back() -> None:
    """Every operation raises RegistryUnreachable while the server is down; the registry works once it is up again."""
    with EmbeddedRedis() as server:
        async with opened(server.url, "app") as registry:
            await registry.register(expert_replica())
            server.stop()
            for operation in every_operation(registry):
                with pytest.raises(RegistryUnreachable, match=f"127.0.0.1:{server.port}"):
                    await operation
            with EmbeddedRedis(server.port):
                assert await registry.replicas() == ()
                await registry.register(expert_replica())
                assert await registry.replicas() == (expert_replica(),)


async def test_a_redis_that_lost_the_scripts_gets_them_again(
    redis_server: EmbeddedRedis, app: str, redis_cli: redis.Redis
) -> None:
    """Every operation works on a server with an empty script cache, such as one that was restarted."""
    async with opened(redis_server.url, app) as registry:
        await registry.set_placement(Placement(0, {}))
        for operation in every_operation(registry):
            redis_cli.script_flush()
            assert redis_cli.info("memory")["number_of_cached_scripts"] == 0
            await operation
        assert await registry.expert_demand()
        assert (await registry.placement()).epoch == 1


async def test_a_redis_that_hangs_is_unreachable_soon() -> None:
    """A server that accepts and does not answer fails an operation after its 2 s; once it answers, operations work."""
    with EmbeddedRedis() as server:
        async with opened(server.url, "app") as registry:
            await registry.register(expert_replica())
            os.kill(server.pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(20):
                    results = await asyncio.gather(registry.replicas(), registry.placement(), return_exceptions=True)
            finally:
                os.kill(server.pid, signal.SIGCONT)
            assert [type(result) for result in results] == [RegistryUnreachable] * 2
            assert await registry.replicas() == (expert_replica(),)


def test_one_registry_serves_the_loops_of_several_threads(redis_server: EmbeddedRedis, app: str) -> None:
    """Event loops that run one after another, or at the same time, each get a working client."""
    registry = connect(redis_server.url, fake_system(app=app))
    seen: list[int] = []

    async def life(replica_id: str) -> None:
        for _ in range(10):
            await registry.register(expert_replica(replica_id))
            seen.append(len(await registry.replicas()))
        await registry.close()

    asyncio.run(life("e0"))
    threads = [threading.Thread(target=lambda n=n: asyncio.run(life(f"e{n}"))) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 30
    assert max(seen) == 3


async def test_a_password_is_never_shown() -> None:
    """Errors name the server without user name and password, wherever the URL has them."""
    for url in (
        "redis://alice:s3cret@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password=s3cret&username=alice",
        "unix:///nowhere/redis.sock?password=s3cret",
    ):
        async with opened(url, "app") as registry:
            with pytest.raises(RegistryUnreachable) as caught:
                await registry.replicas()
        assert "s3cret" not in str(caught.value)
        assert "alice" not in str(caught.value)
    for url in ("redis://alice:s3/cret@127.0.0.1:1/0", "redis://:s3cret@h:port", "http://a:s3cret@h", "s3cret@h"):
        with pytest.raises(ConfigError, match="registry") as refused:
            connect(url, SYSTEM)
        assert "cret" not in str(refused.value)


def test_redis_py_is_imported_only_for_a_redis_url() -> None:
    """A machine without redis-py can use a registry file."""
    program = (
        "import sys; from moiety.registry.connect import connect; "
        "connect('file:///x', 'a'); print('redis' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def every_operation(registry: Registry) -> list:
    """One call of each method that talks to the store."""
    return [
        registry.register(expert_replica()),
        registry.deregister("e0"),
        registry.replicas(),
        registry.generation(),
        registry.placement(),
        registry.set_placement(Placement(1, {"experts-0": ExpertSet()})),
        registry.publish_load("r0", demand=demand_of((1,))),
        registry.expert_demand(),
        registry.publish_load("e0", ReplicaLoad(0.0, 0.0, 0.0, 0.0)),
        registry.replica_load(),
        registry.report_missing_experts(0, [1]),
        registry.missing_experts(),
        registry.record_decision({}),
        registry.decisions(),
    ]


async def test_a_cancelled_operation_ends_its_task(redis_server: EmbeddedRedis, app: str) -> None:
    """A task that is cancelled inside an operation ends, at whatever point: redis-py may swallow the cancellation."""
    async with opened(redis_server.url, app) as registry:

        async def beat() -> None:
            while True:
                await registry.register(expert_replica())

        for turns in range(300):
            beating = asyncio.create_task(beat())
            for _ in range(turns % 30):
                await asyncio.sleep(0)
            beating.cancel()
            await asyncio.wait([beating], timeout=1.0)
            assert beating.cancelled(), f"not after {turns % 30} turns of the loop"
