"""The Serve application: one gateway, the routers, and one deployment per expert group.

`serve deploy` calls `build` with the `args` of the config file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from moiety.config import AppSettings, ServiceSettings, resolve
from moiety.core import ExpertSet
from moiety.deploy.arguments import LOOPBACK, carried, router_settings
from moiety.deploy.replicas import ExpertReplica, GatewayReplica, RouterReplica
from moiety.errors import ConfigError
from moiety.model.checkpoint import Checkpoint
from moiety.model.layout import expert_layout

GATEWAY, ROUTER = "gateway", "router"
GATEWAY_CPUS = 0.5
POLICY = "moiety.deploy.autoscaling:ExpertPolicy"

_DRAIN_S: float = ServiceSettings.model_fields["drain_s"].default
_LIFE = {
    "health_check_period_s": 1.0,  # a killed replica is replaced in 2.2 s; Serve's default of 10 makes that 3.7 to 5.7
    "health_check_timeout_s": 10.0,
    "graceful_shutdown_wait_loop_s": 0.1,  # Serve sees no traffic of ours: waiting for it to end is for nothing
    "graceful_shutdown_timeout_s": _DRAIN_S + 7.0,
}


def build(args: Mapping[str, Any] | AppSettings) -> serve.Application:
    """The application for `args`, fields of AppSettings; what is not given comes from MOIETY_* variables.

    Reads the checkpoint's headers, so it must run where the checkpoint is. Raises ConfigError for an unknown or
    impossible argument, CheckpointError for a checkpoint that cannot be served.
    """
    settings = args if isinstance(args, AppSettings) else resolve(AppSettings, args)
    if settings.registry.startswith("file:"):
        raise ConfigError("registry", settings.registry, "Serve's replicas need a redis:// or rediss:// registry")
    router_settings(settings, LOOPBACK[0])  # what a replica would refuse is refused here
    arguments = carried(settings)
    routers = serve.deployment(RouterReplica).options(
        name=ROUTER,
        num_replicas=settings.router_replicas,
        ray_actor_options={"num_cpus": settings.router_cpus, "num_gpus": settings.router_gpus},
        **_LIFE,
    )
    gateway = serve.deployment(GatewayReplica).options(
        name=GATEWAY, num_replicas=1, ray_actor_options={"num_cpus": GATEWAY_CPUS, "num_gpus": 0}, **_LIFE
    )
    experts = [
        _expert_group(settings, arguments, name, str(held)) for name, held in default_placement(settings).items()
    ]
    return gateway.bind(arguments, routers.bind(arguments), *experts)


def default_placement(settings: AppSettings) -> dict[str, ExpertSet]:
    """Deployment name -> the experts it holds until a placement in the registry says otherwise."""
    shape = expert_layout(Checkpoint.open(settings.model)).shape
    return {f"experts-{group}": held for group, held in enumerate(shape.partition(settings.groups))}


def _expert_group(settings: AppSettings, arguments: dict[str, Any], name: str, held: str) -> serve.Application:
    group = settings.group(name)
    # Decisions are made in moiety.policy, with its own patience: Serve carries them out at once.
    scaling = AutoscalingConfig(
        min_replicas=group.min_replicas,
        initial_replicas=max(1, group.min_replicas),
        max_replicas=group.max_replicas,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs={"arguments": arguments, "held": held}),
    )
    deployment = serve.deployment(ExpertReplica).options(
        name=name,
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": group.num_cpus, "num_gpus": group.num_gpus},
        **_LIFE,
    )
    return deployment.bind(arguments, held)
