"""Deploys an application and waits until it serves, for `moiety serve` and the demo."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import ceil
from pathlib import Path
from typing import Self

from moiety.compose.cpu_kernels import build_kernels
from moiety.config.application import AppSettings
from moiety.core.replica import Replica
from moiety.core.system import SystemId
from moiety.deploy.arguments import LOOPBACK, gateway_settings, with_revision
from moiety.deploy.checks import Resources, check_application, check_devices, check_memory, check_registry
from moiety.deploy.memory import MachineMemory, MemoryNeed
from moiety.deploy.ray_cluster import LOGICAL_CPUS, Progress, connected, existing_ray, local_ray, on_this_cluster
from moiety.deploy.ready import ServeStatus, until_ready, wanted_replicas
from moiety.deploy.shutdown import end_application
from moiety.errors import ConfigError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.registry.connect import forget
from moiety.wire.shared_port import check_ports, claimed_ports


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
    this machine with `num_cpus` or as many CPUs as the application may ask for, with `dashboard` and `ray_folder`. Raises
    CheckpointError, ConfigError or RegistryUnreachable before anything is started; ConfigError too if the Ray has an
    application of that name. Raises FailedPrecondition as soon as a
    replica cannot start or Serve has given up, Unavailable if Ray does not start or the application is not ready within
    `wait_s` seconds; in all cases nothing that this call started is left running. `hurried()`: whether the application's
    end waits no longer for running requests.
    """
    began, served = time.monotonic(), False
    args = args.model_copy(update={"model": str(Path(args.model).absolute())})
    with ExitStack() as ends:
        after_ray = ends.enter_context(ExitStack())  # what is done once Ray has ended, if it was started here
        if alone := address is None and not connected():
            gateway = gateway_settings(args, LOOPBACK[0])
            asyncio.run(check_ports(gateway, None))
            ends.enter_context(claimed_ports(gateway))
            check_devices(args)
        asyncio.run(check_registry(args))
        checkpoint = Checkpoint.open(args.model)
        check_application(args, checkpoint)  # the slowest: the first time, it derives the layout
        if alone and args.device == "cpu":
            check_memory(MemoryNeed.of(args, checkpoint), MachineMemory.here(), progress)
        args = with_revision(args, checkpoint)
        if address is not None:
            ends.enter_context(existing_ray(address))
        elif alone:
            if args.device == "cpu":
                build_kernels(progress)
            local = local_ray(
                registry=args.registry.get_secret_value(),
                num_cpus=max(num_cpus, ceil(Resources.at_most(args).cpus)),
                dashboard=dashboard,
                folder=ray_folder,
                progress=progress,
            )
            ends.enter_context(local)
        ray_s = time.monotonic() - began
        progress(f"Ray: ready in {ray_s:.1f} s")
        # These import Ray, whose environment is set by now.
        from ray import serve

        from moiety.deploy.app import application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # `progress` reports the same in fewer lines
        target = serve.RunTarget(application(args, checkpoint), name=args.app, route_prefix=None)
        args = on_this_cluster(args)
        build_s = time.monotonic() - began - ray_s
        serve.start(proxy_location="Disabled")
        status = ServeStatus(args.app)
        if short := _shortage(args):
            progress(f"Ray: {short}")
        if args.app in serve.status().applications:
            how = f"end it with `moiety stop --app {args.app} --ray-address {address or 'auto'}`, or set another name"
            raise ConfigError("app", args.app, f"runs on this Ray already: {how}")
        url = args.registry.get_secret_value()

        def forget_system() -> None:
            if not hurried():  # it waits for the entries of replicas that were killed
                asyncio.run(forget(url, args.system))

        after_ray.callback(forget_system)
        ends.callback(
            end_application,
            args.app,
            progress,
            registry=url,
            # A Ray of its own ends next: where the application has not served yet, nothing needs the time.
            hurried=lambda: hurried() or (alone and not served),
        )
        serve.run_many(
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        gateways = asyncio.run(
            until_ready(args, wanted_replicas(args), status, wait_s, progress, partial(_shortage, args))
        )
        ready_s = time.monotonic() - began - ray_s - build_s
        served = True
        progress(f"{args.app}: ready in {ready_s:.1f} s")
        seconds = {"ray": ray_s, "build": build_s, "ready": ready_s}
        return DeployedApp(args.system, gateways, seconds, ends.pop_all())


def _shortage(args: AppSettings) -> str:
    """Returns what the connected Ray lacks for the application, in words. A cluster that scales may still get it."""
    import ray

    there = ray.cluster_resources()
    return Resources.at_start(args).shortage(there.get("CPU", 0.0), there.get("GPU", 0.0))
