"""Waits until a deployed application is ready: all its replicas are READY in the registry, and Serve reports it running.

Tells meanwhile what is missing, and why a replica did not start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from moiety.config.application import EXPERTS, GATEWAY, ROUTER, AppSettings
from moiety.core.replica import Replica, ReplicaState
from moiety.deploy.arguments import initial_replicas
from moiety.deploy.ray_cluster import Progress
from moiety.deploy.start_failure import StartFailure, failure_in
from moiety.errors import FailedPrecondition, RegistryUnreachable, Unavailable
from moiety.registry.connect import connect
from moiety.registry.interface import Registry

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

POLL_S = 0.1
STILL_S = 15.0


def wanted_replicas(args: AppSettings) -> dict[str, int]:
    """Returns deployment name -> number of replicas to wait for. Hot sets, which start with none, are left out."""
    groups = (f"{EXPERTS}{group}" for group in range(args.groups))
    return {name: initial_replicas(args, name) for name in (GATEWAY, ROUTER, *groups)}


class ServeStatus:
    """What Serve says about application `app` from now on. Create it before the application is deployed.

    Until Serve has taken a new application up, it still shows the texts of the earlier one with that name.
    """

    def __init__(self, app: str) -> None:
        self._app = app
        self._failures: dict[str, StartFailure] = {}  # by deployment, the latest
        self._old = frozenset(_messages(self._found()))

    def check(self) -> bool:
        """Returns whether Serve reports the application as running.

        Raises FailedPrecondition if a replica failed in a way that the next ones will too, or if Serve has given up.
        """
        from ray.serve.schema import ApplicationStatus

        if (found := self._found()) is None:
            return False
        for deployment, message in _messages(found):
            if (deployment, message) not in self._old and (failure := failure_in(message)) is not None:
                self._failures[deployment] = failure
                if failure.final:
                    raise FailedPrecondition(f"{deployment} cannot start: {failure.reason}")
        if found.status is not ApplicationStatus.DEPLOY_FAILED:
            return found.status is ApplicationStatus.RUNNING
        reasons = [f"{deployment}: {failure.reason}" for deployment, failure in self._failures.items()]
        raise FailedPrecondition(f"Serve could not deploy {self._app}: {'; '.join(reasons) or found.message}")

    def failures(self) -> dict[str, str]:
        """Returns deployment -> why its latest replica did not start, for those that Serve tries to start again."""
        return {deployment: failure.reason for deployment, failure in self._failures.items()}

    def _found(self) -> ApplicationStatusOverview | None:
        from ray import serve

        return serve.status().applications.get(self._app)


def _messages(application: ApplicationStatusOverview | None) -> list[tuple[str, str]]:
    """Returns, for each deployment, its name and what Serve says about it."""
    return [] if application is None else [(name, one.message) for name, one in application.deployments.items()]


async def until_ready(
    args: AppSettings,
    wanted: Mapping[str, int],
    status: ServeStatus,
    wait_s: float,
    progress: Progress,
    shortage: Callable[[], str] = lambda: "",
) -> tuple[Replica, ...]:
    """Waits until `wanted` replicas of each deployment of `args.system` are ready; returns the gateways.

    Calls `progress` whenever a deployment's number of ready replicas changes, whenever a replica did not start, and every
    STILL_S while neither happens, then with what `shortage()` says of resources that Ray lacks. Raises FailedPrecondition as
    `ServeStatus.check` does, Unavailable after `wait_s` seconds.
    """
    registry = connect(args.registry.get_secret_value(), args.system)
    ready: dict[str, list[Replica]] = {}
    failures: dict[str, str] = {}
    reported_at = time.monotonic()

    def report(line: str) -> None:
        nonlocal reported_at
        reported_at = time.monotonic()
        progress(line)

    try:
        async with asyncio.timeout(wait_s):
            while True:
                before, ready = ready, await _ready(registry)
                for deployment, replicas in ready.items():
                    if len(replicas) != len(before.get(deployment, [])):
                        report(f"{deployment}: {len(replicas)}/{wanted.get(deployment, 0)} ready")
                complete = all(len(ready.get(deployment, [])) >= count for deployment, count in wanted.items())
                if status.check() and complete:
                    return tuple(ready[GATEWAY])
                known, failures = failures, status.failures()
                for deployment in failures:
                    if failures[deployment] != known.get(deployment):
                        report(f"{deployment}: a replica did not start, Serve tries again: {failures[deployment]}")
                if time.monotonic() - reported_at > STILL_S:
                    report(f"still waiting for {_late(ready, wanted, shortage())}")
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        late = _late(ready, wanted, shortage())
        reasons = "".join(f"; {deployment}: {reason}" for deployment, reason in failures.items())
        raise Unavailable(f"{args.app} is not ready after {wait_s:g} s: still waiting for {late}{reasons}") from None
    finally:
        await registry.close()


def _late(ready: Mapping[str, Sequence[Replica]], wanted: Mapping[str, int], short: str) -> str:
    """Returns what `wanted` lacks, in words, and the resources that are `short`. A router waits until every expert is held."""
    late = []
    for name, count in wanted.items():
        if (found := len(ready.get(name, ()))) < count:
            late.append(f"{name} ({found}/{count}{'; it needs every expert' if name == ROUTER else ''})")
    return (", ".join(late) or "Serve to report the application as running") + (f"; {short}" if short else "")


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
