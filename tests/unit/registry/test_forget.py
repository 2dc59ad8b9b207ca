"""What a system that was ended on purpose leaves in a Redis that it shares."""

from __future__ import annotations

import contextlib

import redis
from registry_support import demand_of, expert_replica, opened, prefix_of

from moiety.core.load import ReplicaLoad
from moiety.core.replica import Placement, Role
from moiety.registry.connect import connect, forget
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.testing import fake_system


async def test_a_forgotten_system_leaves_no_key(redis_server: EmbeddedRedis, app: str, redis_cli: redis.Redis) -> None:
    """After a clean end, a shared Redis has no key of the system, and all keys of the application's other system."""
    other = connect(redis_server.url, fake_system(app=app, cluster="other"))
    async with opened(redis_server.url, app) as registry, contextlib.AsyncExitStack() as ends:
        ends.push_async_callback(other.close)
        for each, name in ((registry, "r0"), (other, "r1")):
            await each.register(expert_replica(name, role=Role.ROUTER))
            await each.set_placement(Placement(1, {}))
            for second in (0.0, 1.0):
                await each.publish_load(
                    name, ReplicaLoad(0.5, 1.0, 2.0, 3.0), demand_of((int(9 * second),), time=second)
                )
            await each.report_missing_experts(0, [1])
            await each.record_decision({"deployment": "router"})
        kept = {key for key in redis_cli.keys(f"moiety:{{{app}}}:*") if not key.startswith(prefix_of(app))}
        assert len(redis_cli.keys(f"{prefix_of(app)}*")) >= 14
        await registry.deregister("r0")
        await forget(redis_server.url, fake_system(app=app))
        assert set(redis_cli.keys(f"moiety:{{{app}}}:*")) == kept
        assert await other.systems() == (fake_system(app=app, cluster="other"),)
