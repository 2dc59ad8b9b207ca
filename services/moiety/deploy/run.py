"""Deploys an application and waits until it serves, for `moiety serve` and the demo."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from moiety.config.application import AppSettings
from moiety.core.replica import Replica
from moiety.core.system import SystemId
from moiety.deploy.arguments import LOOPBACK, gateway_settings, router_settings, with_revision
from moiety.deploy.ray_cluster import LOGICAL_CPUS, connected, existing_ray, local_ray, on_this_cluster
from moiety.deploy.ready import Progress, until_ready, wanted_replicas
from moiety.deploy.shutdown import end_application
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout
from moiety.registry.connect import connect, forget
from moiety.wire.shared_port import check_ports


class DeployedApp:
    """A deployed application. Leaving its context calls `shutdown`."""

    def __init__(
        self, system: SystemId, gateways: Sequence[Replica], seconds: Mapping[str, float], ends: ExitStack
    ) -> None:
        self.system = system
        self.gateways = tuple(gateway.address for gateway in gateways)  # host:port of each gateway's gRPC API
        self.http = tuple(
            filter(None, (gateway.http_address for gateway in gateways))
        )  # of its HTTP API, where it has one
        self.seconds = seconds  # duration of each stage: ray, build, ready
        self._ends = ends

    def shutdown(self) -> None:
        """Drains and ends what `deploy_app` started, but leaves what ran before. A second call does nothing."""
        self._ends.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def deploy_app(
    args: AppSettings,
    *,
    wait_s: float = 180.0,
    address: str | None = None,
    num_cpus: int = LOGICAL_CPUS,
    dashboard: bool = False,
    ray_folder: Path | None = None,
    progress: Progress = lambda line: None,
    hurried: Callable[[], bool] = lambda: False,
) -> DeployedApp:
    """Deploys the application and waits until every replica is ready. Tells `progress` what has become ready.

    Uses the Ray at `address` if given, else the Ray that this process is connected to. If there is neither, starts a Ray on
    this machine with `num_cpus`, `dashboard` and `ray_folder`. Raises CheckpointError, ConfigError or RegistryUnreachable
    before anything is started. Raises FailedPrecondition if Serve could not deploy the application, Unavailable if it is
    not ready within `wait_s` seconds; in both cases nothing that this call started is left running. `hurried()`: whether
    the application's end waits no longer for running requests.
    """
    began = time.monotonic()
    args = args.model_copy(update={"model": str(Path(args.model).absolute())})
    args = _checked(args, alone=address is None and not connected())
    with ExitStack() as ends:
        last = ends.enter_context(ExitStack())  # what is done once Ray has ended, if it was started here
        if address is not None:
            ends.enter_context(existing_ray(address))
        elif not connected():
            registry = args.registry.get_secret_value()
            local = local_ray(registry=registry, num_cpus=num_cpus, dashboard=dashboard, folder=ray_folder)
            ends.enter_context(local)
        ray_s = time.monotonic() - began
        progress(f"Ray: ready in {ray_s:.1f} s")
        # These import Ray, whose environment is set by now.
        from ray import serve

        from moiety.deploy.app import build

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # `progress` reports the same in fewer lines
        application = build(args)
        args = on_this_cluster(args)
        build_s = time.monotonic() - began - ray_s
        serve.start(proxy_location="Disabled")
        if args.app not in serve.status().applications:
            url = args.registry.get_secret_value()
            last.callback(lambda: asyncio.run(forget(url, args.system)))
            ends.callback(end_application, args.app, progress, registry=url, hurried=hurried)
        serve.run_many(
            [serve.RunTarget(application, name=args.app, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        gateways = asyncio.run(until_ready(args, wanted_replicas(args), wait_s, progress))
        ready_s = time.monotonic() - began - ray_s - build_s
        progress(f"{args.app}: ready in {ready_s:.1f} s")
        seconds = {"ray": ray_s, "build": build_s, "ready": ready_s}
        return DeployedApp(args.system, gateways, seconds, ends.pop_all())


def _checked(args: AppSettings, *, alone: bool) -> AppSettings:
    """Returns `args` with the checkpoint's revision.

    Checks the arguments, the checkpoint, the registry and, if the application will run `alone` on a Ray of its own, the
    gateway's ports, so that a wrong one fails before Ray is started.
    """

    async def reach_registry() -> None:
        registry = connect(args.registry.get_secret_value(), args.system)
        try:
            await registry.replicas()
        finally:
            await registry.close()

    router_settings(args, LOOPBACK[0])
    if alone:
        asyncio.run(check_ports(gateway_settings(args, LOOPBACK[0]), None))
    checkpoint = Checkpoint.open(args.model)
    expert_layout(checkpoint).shape.sliced_partition(args.groups, args.slices)
    asyncio.run(reach_registry())
    return with_revision(args, checkpoint)
