"""Hot sets through Ray Serve: deployed empty, filled from the load in the ledger, kept only while that pays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from moiety.client import Client
from moiety.config.application import AppSettings
from moiety.core.replica import Replica, ReplicaState, Role
from moiety.core.system import SystemId
from moiety.deploy.run import DeployedApp, deploy_app
from moiety.registry.connect import connect
from moiety.registry.interface import Registry
from support.ray_head import RayHead

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

APP = "hotsets"
PROMPT = [7] * 8
TOKENS = 24
STREAMS = 3
WAIT_S = 60.0


@pytest.fixture(scope="module")
def app(ray_head: RayHead) -> Iterator[DeployedApp]:
    """Deploys two groups that may not grow, and a hot set for four experts: only it can take more load."""
    settings = AppSettings(
        app=APP,
        model=ray_head.model,
        groups=2,
        hot_sets=1,
        hot_memory=4 * 3 * 64 * 96 * 4,
        rebalance_gain=0.05,
        registry=ray_head.redis_url,
        dtype="float32",
        gateway={"port": 0, "http_port": 0},
        router={
            "num_cpus": 0.1,
            "kv_memory": 64 << 20,
            "max_replicas": 2,
            "target_busy": 0.9,
            "shrink_after_s": 2.0,
        },
        experts={"num_cpus": 0.1, "max_replicas": 1, "capacity": 300.0, "shrink_after_s": 2.0},
    )
    with deploy_app(settings, wait_s=120, progress=print) as deployed:
        yield deployed


async def test_a_hot_set_comes_and_goes_with_expert_load(app: DeployedApp, ray_head: RayHead) -> None:
    """Load fills the hot set and starts its replica; tokens and other processes stay; without load it goes to zero.

    Over 20 s: expert load is smoothed over ten seconds, and Ray starts a replica.
    """
    async with _registry(ray_head.redis_url, app.system) as registry:
        async with Client(app.gateways[0]) as client:
            expected = await tokens_of(client)
            before = {replica.deployment: replica.pid for replica in await ready(registry)}
            assert set(before) == {"experts-0", "experts-1", "router", "gateway"}
            ending = asyncio.Event()

            async def stream() -> None:
                while not ending.is_set():
                    assert await tokens_of(client) == expected

            async with asyncio.TaskGroup() as group:
                for _ in range(STREAMS):
                    group.create_task(stream())
                try:
                    await until(lambda: serves(registry, "hot-0"))
                    after = {replica.pid for replica in await ready(registry)}
                    hot = next(replica for replica in await ready(registry) if replica.deployment == "hot-0")
                    assert after >= set(before.values())
                    assert 0 < len(hot.held) <= 4
                finally:
                    ending.set()
            await until(lambda: gone(registry, "hot-0"))
            assert await tokens_of(client) == expected
        for entry in await registry.decisions():
            print(f"{entry['deployment']} {entry['from']} → {entry['to']}: {entry['reason']}")
        moves = [(entry["deployment"], entry["from"], entry["to"]) for entry in await registry.decisions()]
        assert moves.index(("placement", 1, 2)) < moves.index(("hot-0", 0, 1)) < moves.index(("hot-0", 1, 0))
        assert {name for name, _, _ in moves} <= {"placement", "hot-0", "router"}  # the router's queue may scale it too


async def tokens_of(client: Client) -> list[int]:
    """Generates from PROMPT and returns the tokens."""
    stream = client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)
    return [token async for chunk in stream for token in chunk.token_ids]


async def ready(registry: Registry) -> list[Replica]:
    """Returns all replicas that are ready."""
    return [replica for replica in await registry.replicas() if replica.state is ReplicaState.READY]


async def serves(registry: Registry, deployment: str) -> bool:
    """Whether a ready replica of `deployment` has computed rows."""
    return any(replica.deployment == deployment and replica.served for replica in await ready(registry))


async def gone(registry: Registry, deployment: str) -> bool:
    """Whether `deployment` has no replica left."""
    return not any(
        replica.deployment == deployment and replica.role is Role.EXPERT for replica in await registry.replicas()
    )


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits until `condition` holds. Raises TimeoutError after WAIT_S."""
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _registry(url: str, system: SystemId) -> AsyncIterator[Registry]:
    registry = connect(url, system)
    try:
        yield registry
    finally:
        await registry.close()
