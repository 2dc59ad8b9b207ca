"""Waits until a deployed application is ready: all its replicas are READY in the registry, and Serve reports it running."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from moiety.config.application import EXPERTS, GATEWAY, ROUTER, AppSettings
from moiety.core.replica import Replica, ReplicaState
from moiety.deploy.arguments import initial_replicas
from moiety.errors import FailedPrecondition, RegistryUnreachable, Unavailable
from moiety.registry.connect import connect
from moiety.registry.interface import Registry

POLL_S = 0.1
STILL_S = 15.0
Progress = Callable[[str], None]


def wanted_replicas(args: AppSettings) -> dict[str, int]:
    """Returns deployment name -> number of replicas to wait for. Hot sets, which start with none, are left out."""
    groups = (f"{EXPERTS}{group}" for group in range(args.groups))
    return {name: initial_replicas(args, name) for name in (GATEWAY, ROUTER, *groups)}


async def until_ready(
    args: AppSettings, wanted: Mapping[str, int], wait_s: float, progress: Progress
) -> tuple[Replica, ...]:
    """Waits until `wanted` replicas of each deployment of `args.system` are ready; returns the gateways.

    Calls `progress` whenever a deployment's number of ready replicas changes, and every STILL_S while none does. Raises
    FailedPrecondition if Serve could not deploy the application, Unavailable after `wait_s` seconds.
    """
    registry = connect(args.registry.get_secret_value(), args.system)
    ready: dict[str, list[Replica]] = {}
    reported_at = time.monotonic()
    try:
        async with asyncio.timeout(wait_s):
            while True:
                before, ready = ready, await _ready(registry)
                for deployment, replicas in ready.items():
                    if len(replicas) != len(before.get(deployment, [])):
                        progress(f"{deployment}: {len(replicas)}/{wanted.get(deployment, 0)} ready")
                        reported_at = time.monotonic()
                if time.monotonic() - reported_at > STILL_S:
                    reported_at = time.monotonic()
                    progress(f"still waiting for {', '.join(_late(ready, wanted))}")
                complete = all(len(ready.get(deployment, [])) >= count for deployment, count in wanted.items())
                if _serve_runs(args.app) and complete:
                    return tuple(ready[GATEWAY])
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        late = ", ".join(_late(ready, wanted))
        raise Unavailable(f"{args.app} is not ready after {wait_s:g} s: still waiting for {late}") from None
    finally:
        await registry.close()


def _late(ready: Mapping[str, Sequence[Replica]], wanted: Mapping[str, int]) -> list[str]:
    """Returns what `wanted` lacks, in words. A router is ready once every expert has a holder."""
    late = []
    for name, count in wanted.items():
        if (found := len(ready.get(name, ()))) < count:
            late.append(f"{name} ({found}/{count}{'; it needs every expert' if name == ROUTER else ''})")
    return late or ["Serve to report the application as running"]


async def _ready(registry: Registry) -> dict[str, list[Replica]]:
    """Returns deployment -> its ready replicas; empty while the registry does not answer."""
    ready: dict[str, list[Replica]] = {}
    try:
        for replica in await registry.replicas():
            if replica.state is ReplicaState.READY:
                ready.setdefault(replica.deployment, []).append(replica)
    except RegistryUnreachable:
        return {}
    return ready


def _serve_runs(app: str) -> bool:
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    found = serve.status().applications.get(app)
    if found is not None and found.status is ApplicationStatus.DEPLOY_FAILED:
        raise FailedPrecondition(f"Serve could not deploy {app}: {found.message}")
    return found is not None and found.status is ApplicationStatus.RUNNING
