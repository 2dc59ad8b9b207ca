"""Elasticity through Ray Serve: a hot group grows and shrinks, a killed replica is replaced, and no request fails."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
from ray import serve

from moiety.client import Client
from moiety.config.application import AppSettings
from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement, Replica, ReplicaState
from moiety.core.system import SystemId
from moiety.deploy.arguments import with_revision
from moiety.deploy.run import DeployedApp, deploy_app
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.registry.connect import connect
from moiety.registry.interface import Registry
from support.ray_head import RayHead

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

APP = "scaling"
HOT, COLD = "experts-0", "experts-1"
PROMPT = list(range(1, 9))
TOKENS = 12
STREAMS = 3
WAIT_S = 60.0


@pytest.fixture(scope="module")
def app(ray_head: RayHead) -> Iterator[DeployedApp]:
    """Deploys two groups: the first holds all experts but one, and pacing makes that too much for one replica."""
    settings = AppSettings(
        app=APP,
        cluster="tests",
        model=ray_head.model,
        groups=2,
        registry=ray_head.redis_url,
        gateway={"port": 0, "http_port": 0},
        router={"num_cpus": 0.1, "kv_memory": 64 << 20},
        experts={
            "num_cpus": 0.1,
            "min_replicas": 1,
            "max_replicas": 2,
            "capacity": 100.0,
            "target_busy": 0.7,
            "queue_wait_ms": 10_000.0,
            "shrink_after_s": 2.0,
        },
    )
    checkpoint = Checkpoint.open(ray_head.model)
    shape = expert_layout(checkpoint).shape
    split = shape.experts - 1
    held = {
        HOT: ExpertSet.uniform(shape.moe_layers, range(split)),
        COLD: ExpertSet.uniform(shape.moe_layers, [split]),
    }
    asyncio.run(_place(ray_head.redis_url, with_revision(settings, checkpoint).system, held))
    with deploy_app(settings, wait_s=120, progress=print) as deployed:
        yield deployed


async def test_a_hot_group_grows_and_shrinks_under_traffic(app: DeployedApp, ray_head: RayHead) -> None:
    """High load adds a second replica to the hot group only, low load removes it; all answers have the same tokens."""
    async with _registry(ray_head.redis_url, app.system) as registry:
        async with _traffic(app.gateways[0], STREAMS) as answers:
            await _until(lambda: _count(registry, HOT, 2))
            await _more(answers, STREAMS)
        async with _traffic(app.gateways[0], 1, tokens=2, pause_s=1.5) as answers:
            await _until(lambda: _count(registry, HOT, 1))
            await _more(answers, 1)
        moves = [(entry["deployment"], entry["from"], entry["to"]) for entry in await registry.decisions()]
        assert moves == [(HOT, 1, 2), (HOT, 2, 1)]


async def test_a_killed_sole_replica_is_replaced_and_requests_go_on(app: DeployedApp, ray_head: RayHead) -> None:
    """kill -9 of an expert's only holder fails no request: all wait for its replacement and get the same tokens."""
    async with _registry(ray_head.redis_url, app.system) as registry:
        await _until(lambda: _count(registry, COLD, 1))
        (victim,) = await _ready(registry, COLD)
        async with _traffic(app.gateways[0], STREAMS) as answers:
            await _more(answers, 1)
            os.kill(victim.pid, signal.SIGKILL)
            await _until(lambda: _replaced(registry, victim))
            await _more(answers, STREAMS)


async def test_a_sick_sole_replica_is_replaced_and_requests_go_on(app: DeployedApp, ray_head: RayHead) -> None:
    """Serve replaces a replica whose device hangs, though its process lives: all requests get the same tokens.

    Takes 20 s: the device counts as hung after 5 s, and Serve looks three times before it starts another replica.
    """
    async with _registry(ray_head.redis_url, app.system) as registry:
        await _until(lambda: _count(registry, COLD, 1))
        (sick,) = await _ready(registry, COLD)
        async with _traffic(app.gateways[0], STREAMS) as answers:
            await _more(answers, 1)
            await serve.get_deployment_handle(COLD, APP).reconfigure.remote({"fault": "hang"})
            await _until(lambda: _replaced(registry, sick))
            await _more(answers, STREAMS)


@asynccontextmanager
async def _traffic(
    address: str, streams: int, *, tokens: int = TOKENS, pause_s: float = 0.0
) -> AsyncIterator[list[tuple[int, ...]]]:
    """Generates in a loop on `streams` streams; on exit asserts that none failed and that all answers are equal."""
    answers: list[tuple[int, ...]] = []
    ending = asyncio.Event()

    async def stream(client: Client) -> None:
        while not ending.is_set():
            answer: tuple[int, ...] = ()
            async for chunk in client.generate(PROMPT, max_tokens=tokens, ignore_eos=True):
                answer += chunk.token_ids
            answers.append(answer)
            with suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), pause_s)

    async with Client(address) as client, asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream(client))
        try:
            yield answers
        finally:
            ending.set()
    assert len(set(answers)) == 1
    assert len(answers[0]) == tokens


@asynccontextmanager
async def _registry(url: str, system: SystemId) -> AsyncIterator[Registry]:
    registry = connect(url, system)
    try:
        yield registry
    finally:
        await registry.close()


async def _place(url: str, system: SystemId, held: dict[str, ExpertSet]) -> None:
    async with _registry(url, system) as registry:
        assert await registry.set_placement(Placement(1, held))


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.05)


async def _ready(registry: Registry, deployment: str) -> list[Replica]:
    return [
        replica
        for replica in await registry.replicas()
        if (replica.deployment, replica.state) == (deployment, ReplicaState.READY)
    ]


async def _count(registry: Registry, deployment: str, count: int) -> bool:
    return len(await _ready(registry, deployment)) == count


async def _replaced(registry: Registry, victim: Replica) -> bool:
    return any(replica.id != victim.id for replica in await _ready(registry, victim.deployment))


async def _more(answers: list[tuple[int, ...]], count: int) -> None:
    """Waits for `count` more answers than there are now."""
    wanted = len(answers) + count

    async def arrived() -> bool:
        return len(answers) >= wanted

    await _until(arrived)
