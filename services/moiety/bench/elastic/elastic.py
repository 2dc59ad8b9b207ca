"""`moiety bench elastic`: runs a live Ray system under a skewed load that rises and falls, and records its replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from moiety.bench.elastic.report import ElasticReport, LoadSample, ReplicaStart, report_of
from moiety.bench.elastic.traffic import Traffic, skewed_prompts
from moiety.client import Client
from moiety.config.application import AppSettings, ExpertDeployment, GatewayDeployment, RouterDeployment
from moiety.config.registry_url import RegistryUrl
from moiety.config.run_folder import scratch_folder
from moiety.core.replica import ready_experts
from moiety.deploy.ray_cluster import environment
from moiety.deploy.run import DeployedApp, deploy_app
from moiety.registry.connect import connect
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.interface import Registry
from moiety.registry.rates import latest_costs, main_costs
from moiety.synthetic import write_tiny

SAMPLE_S = 0.25
SETTLE_S = 3.0  # without traffic before the first phase, so that the ledger's window empties

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ElasticWork:
    """The load to offer, and the system to offer it to."""

    groups: int = 2
    capacity: float = 200.0  # rows per second that each replica is paced to
    max_replicas: int = 3
    low: float = 0.4  # requests per second while load is low
    high: float = 8.0  # requests per second while load is high
    seconds: tuple[float, float, float] = (10.0, 30.0, 40.0)  # of low load, high load, and low load again
    zipf: float = 1.6  # exponent of the skew over prompts
    new_tokens: int = 6
    seed: int = 0
    shrink_after_s: float = 5.0


def bench_elastic(work: ElasticWork, *, wait_s: float = 120.0, progress: Progress = lambda _: None) -> ElasticReport:
    """Starts Ray, Redis and the system, offers the load, and stops all of it.

    Raises Unavailable where the system is not ready within `wait_s`.
    """
    with ExitStack() as ends:
        folder = ends.enter_context(scratch_folder())
        model = folder / "tiny-mixtral"
        write_tiny("mixtral", model, num_hidden_layers=2)
        redis = ends.enter_context(EmbeddedRedis())
        settings = AppSettings(
            app="elastic",
            model=str(model),
            dtype="float32",
            groups=work.groups,
            registry=RegistryUrl(redis.url),
            gateway=GatewayDeployment(port=0, http_port=0),
            # without prefix cache: a repeated prompt must be computed again, because its rows are the load
            router=RouterDeployment(num_cpus=0.1, prefix_cache=False),
            experts=ExpertDeployment(
                max_replicas=work.max_replicas,
                num_cpus=0.1,
                capacity=work.capacity,
                target_busy=0.7,
                queue_wait_ms=2_000.0,
                shrink_after_s=work.shrink_after_s,
            ),
        )
        with environment({"MOIETY_CACHE": str(folder / "cache")}):
            deployed = ends.enter_context(
                deploy_app(settings, progress=progress, wait_s=wait_s, ray_folder=folder / "ray")
            )
        report = asyncio.run(_offer(work, settings, deployed, progress))
        progress("stop: replicas drain, then Ray and Redis end")
    return report


async def _offer(work: ElasticWork, settings: AppSettings, deployed: DeployedApp, progress: Progress) -> ElasticReport:
    registry = connect(settings.registry.get_secret_value(), deployed.system)
    try:
        async with Client(deployed.gateways[0]) as client:
            prompts = await skewed_prompts(client, registry, work.zipf, work.seed, progress)
            await asyncio.sleep(SETTLE_S)
            traffic = Traffic(client, prompts, work.new_tokens, work.seed)
            moments: list[LoadSample] = []
            watching = asyncio.create_task(_watch(registry, moments, traffic))
            phases = []
            try:
                for rate, seconds in zip((work.low, work.high, work.low), work.seconds, strict=True):
                    progress(f"{rate:g} requests/s for {seconds:g} s")
                    phases.append((time.time(), rate))
                    await traffic.offer(rate, seconds)
                await traffic.finish()
            finally:
                watching.cancel()
                await asyncio.wait([watching])
            if not watching.cancelled() and (failed := watching.exception()):
                raise failed
            decisions = [entry for entry in await registry.decisions() if entry["deployment"] != "placement"]
            costs = main_costs(latest_costs(await registry.expert_demand()))
            return report_of(work.capacity, prompts, phases, moments, decisions, traffic, costs)
    finally:
        await registry.close()


async def _watch(registry: Registry, moments: list[LoadSample], traffic: Traffic) -> None:
    """Appends a LoadSample to `moments` every SAMPLE_S seconds, until the task is cancelled."""
    while True:
        replicas = ready_experts(await registry.replicas())
        loads, counts, rows = await registry.replica_load(), dict[str, int](), dict[str, float]()
        for replica in replicas:
            counts[replica.deployment] = counts.get(replica.deployment, 0) + 1
            load = loads.get(replica.id)
            rows[replica.deployment] = rows.get(replica.deployment, 0.0) + (load.rows_per_s if load else 0.0)
        starts = tuple(ReplicaStart(r.id, r.deployment, r.launched, r.loaded, r.started, r.served) for r in replicas)
        moments.append(LoadSample(time.time(), counts, rows, traffic.running, starts))
        await asyncio.sleep(SAMPLE_S)
