"""`moiety bench control`: measures planning, the dispatch table and the traffic on Redis of a large system."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from moiety.core.experts import ExpertSet
from moiety.core.load import ExpertDemand, ReplicaLoad
from moiety.core.replica import Placement, Replica, Role
from moiety.core.system import SystemId
from moiety.errors import Unavailable
from moiety.policy.dispatch import HolderTable
from moiety.policy.dispatch import plan_dispatch as dispatch
from moiety.policy.placement.planner import DeploymentCapacity, plan_placement
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import HEARTBEAT_S
from moiety.registry.redis import REWRITE_S, RedisRegistry

WATCH_S = 0.25  # seconds between a router's readings of the replica table
AUTOSCALER_S = 0.25  # seconds between the autoscaler's readings of everything
LEDGER_S = 1.0  # seconds between a writer's entries in the load ledger
AT_ONCE = 32  # requests to Redis that run at the same time
ATTEMPTS = 5  # to write all entries before the first of them expires


@dataclass(frozen=True, slots=True)
class ControlWork:
    """The size of the system to measure, which exists only as registry entries."""

    replicas: int = 2000
    routers: int = 16
    layers: int = 58
    experts: int = 256
    groups: int = 64
    hot_sets: int = 16
    rounds: int = 5


@dataclass(frozen=True, slots=True)
class ControlReport:
    """The results of `moiety bench control`. Times of planning and dispatch are medians of the rounds."""

    plan_s: float  # to plan without a placement in force
    replan_s: float  # to plan from a placement in force, after the expert load has drifted
    replan_gain: float  # part of the critical path that the second plan saves, 0 to 1
    table_s: float  # to build the dispatch table
    dispatch_s: float  # to dispatch one layer's decode batch, 256 tokens, over that table
    redis_operations_per_s: float  # sent by such a system
    redis_bytes_per_s: float
    redis_busy: float  # share of one server core: CPU seconds per second of this traffic
    redis_change_bytes: float  # when every entry changes: each is written once, and read by every reader


def bench_control(work: ControlWork, progress: Callable[[str], None] = lambda _: None) -> ControlReport:
    """Measures the control plane of `work` on this machine, with a real Redis that it starts."""
    random = np.random.default_rng(0)
    weights = 1.0 / np.arange(1, work.experts + 1)
    expert_load = random.permuted(np.tile(weights, (work.layers, 1)), axis=1)  # [layers, experts], Zipf's law
    drifted = expert_load * np.exp(0.3 * random.standard_normal(expert_load.shape))
    memory = work.layers * -(-work.experts // work.groups)
    deployments = [f"experts-{index}" for index in range(work.groups)]
    deployments += [f"hot-{index}" for index in range(work.hot_sets)]
    counts = [
        work.replicas // len(deployments) + (i < work.replicas % len(deployments)) for i in range(len(deployments))
    ]
    capacities = [
        DeploymentCapacity(name, memory, count, name.startswith("hot"))
        for name, count in zip(deployments, counts, strict=True)
    ]
    progress("planning")
    first, plan_s = _timed(work.rounds, lambda: plan_placement(expert_load, capacities, None))
    second, replan_s = _timed(work.rounds, lambda: plan_placement(drifted, capacities, first.placement))
    progress("dispatch table")
    replicas = list(_replicas(first.placement, dict(zip(deployments, counts, strict=True))))
    held = {replica.id: replica.held for replica in replicas}
    table, table_s = _timed(work.rounds, lambda: HolderTable.build(1, held, work.layers, work.experts))
    tokens = np.stack([random.choice(work.experts, 8, replace=False) for _ in range(256)]).ravel()
    _, dispatch_s = _timed(work.rounds, lambda: dispatch(table, 0, tokens, np.arange(len(tokens))))
    progress(f"Redis: the traffic of {len(replicas)} replicas and {work.routers} routers")
    redis = asyncio.run(_redis(work, replicas, expert_load))
    return ControlReport(plan_s, replan_s, second.gain, table_s, dispatch_s, *redis)


def control_lines(report: ControlReport, work: ControlWork) -> Iterator[str]:
    """Yields the lines of the report: the size of the system, then one line per measurement."""
    pairs = work.layers * work.experts
    yield f"{work.replicas:,} replicas of {work.groups} groups and {work.hot_sets} hot sets, {pairs:,} (layer, expert) pairs"
    yield f"plan from nothing       {1000 * report.plan_s:8.1f} ms"
    yield f"plan from one in force  {1000 * report.replan_s:8.1f} ms   ({report.replan_gain:.1%} saved)"
    yield f"dispatch table rebuild  {1000 * report.table_s:8.1f} ms"
    yield f"dispatch of one layer   {1000 * report.dispatch_s:8.2f} ms   (256 tokens, top-8)"
    yield (
        f"Redis, {work.routers} routers      {report.redis_operations_per_s:8,.0f} operations/s, "
        f"{report.redis_bytes_per_s / 1e6:,.1f} MB/s, {report.redis_busy:.0%} of a core"
    )
    yield (
        f"every entry changed     {report.redis_change_bytes / 1e6:8,.1f} MB   "
        "(once, by a new placement: each entry is written, and read by all)"
    )


def _timed(rounds: int, run: Callable[[], Any]) -> tuple[Any, float]:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - began)
    return result, median(seconds)


def _replicas(placement: Placement, counts: dict[str, int]) -> Iterator[Replica]:
    """Yields `counts[name]` replicas of each deployment. Parses their expert sets from text, as a registry reader does."""
    for deployment, held in placement.held.items():
        for number in range(counts[deployment]):
            name = f"{deployment}-{number:04}"
            yield Replica(
                id=name,
                role=Role.EXPERT,
                deployment=deployment,
                address=f"10.0.{number // 250}.{number % 250}:50100",
                node=f"node-{number}",
                model="model",
                revision="0" * 32,
                held=ExpertSet.parse(str(held)),
                placement_epoch=placement.epoch,
            )


async def _redis(
    work: ControlWork, replicas: Sequence[Replica], expert_load: np.ndarray
) -> tuple[float, float, float, float]:
    """Returns what one second of the system's traffic costs Redis: operations, bytes transferred, CPU seconds.

    The fourth value is the bytes transferred when every registry entry changes once. Each kind of request is measured by
    itself. Its cost is multiplied by the number of such requests per second.
    """
    with EmbeddedRedis() as server:
        registry, gate = (
            RedisRegistry(server.url, SystemId("bench", "here", "0" * 32, work.groups, 1)),
            asyncio.Semaphore(AT_ONCE),
        )
        counts = tuple(map(tuple, (1e6 * expert_load / expert_load.max()).astype(int).tolist()))
        demand = ExpertDemand(counts, counts, time=1.0)
        busy = ReplicaLoad(busy=0.612345, queue_wait_ms=1.234567, rows_per_s=123456.7, calls_per_s=2345.6)

        async def gated(action: Awaitable[Any]) -> None:
            async with gate:
                await action

        async def counted(actions: Sequence[Awaitable[Any]]) -> np.ndarray:
            before = np.array(await registry.server_counters())
            await asyncio.gather(*map(gated, actions))
            return np.array(await registry.server_counters()) - before

        reading_counters = await counted([])

        async def cost(actions: Sequence[Awaitable[Any]]) -> np.ndarray:
            return await counted(actions) - reading_counters

        try:
            await registry.set_placement(Placement(1, {replica.deployment: replica.held for replica in replicas}))
            beats, loads = 1 / HEARTBEAT_S, 1 / LEDGER_S
            routers = [f"router-{number}" for number in range(work.routers)]
            total = loads * await cost([registry.publish_load(router, busy, demand) for router in routers])
            total += beats * await cost([registry.placement_epoch() for _ in replicas])
            total += loads * await cost([registry.publish_load(replica.id, busy) for replica in replicas])
            # The autoscaler gets all counters once a second, as often as they are written; its other readings find the
            # counters unchanged. It reads everything else each time.
            total += loads * await cost([registry.expert_demand()])
            total += (1 / AUTOSCALER_S - loads) * await cost([registry.expert_demand()])
            total += (1 / AUTOSCALER_S) * await cost(
                [registry.replica_load(), registry.missing_experts(), registry.placement()]
            )
            reads = round(work.routers / WATCH_S + 1 / AUTOSCALER_S)
            for _ in range(ATTEMPTS):  # on a busy machine the first entries expire before the last is written
                written = await cost([registry.register(replica) for replica in replicas])
                read = await cost([registry.replicas()])
                complete = len(await registry.replicas()) == len(replicas)
                beat = await cost([registry.register(replica) for replica in replicas])
                polls = [poll() for _ in range(reads) for poll in (registry.replicas, registry.generation)]
                unchanged = await cost(polls)
                if complete and len(await registry.replicas()) == len(replicas):
                    break
                for replica in replicas:
                    await registry.deregister(replica.id)
            else:
                raise Unavailable(
                    f"{len(replicas)} registry entries expired before all were written: this machine is too busy; use "
                    "fewer --replicas"
                )
            total += beats * beat + written / REWRITE_S + unchanged
            changed = written + (work.routers + 1) * read  # + 1 for the autoscaler
        finally:
            await registry.close()
    operations, transferred, seconds = total.tolist()
    return operations, transferred, seconds, float(changed[1])
