"""The Serve application: gateway, routers, and one deployment per expert group and per hot set.

`serve deploy` calls `build` with the `args` of the config file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from moiety.config.application import GATEWAY, HOT, ROUTER, AppSettings
from moiety.config.resolve import resolve
from moiety.core.experts import ExpertSet
from moiety.deploy.arguments import initial_replicas, to_arguments, with_revision
from moiety.deploy.checks import check_application
from moiety.deploy.replicas import ExpertReplica, GatewayReplica, RouterReplica
from moiety.deploy.shutdown import EXTRA_S
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.experts.cached import expert_layout

POLICY = "moiety.deploy.autoscaling_hook:LoadPolicy"


def build(args: Mapping[str, Any] | AppSettings) -> serve.Application:
    """Returns the application for `args`: AppSettings, or a mapping of fields that this process's environment completes.

    Reads the checkpoint's headers, so it must run where the checkpoint is. Its revision becomes part of the application:
    a replica refuses another one, and deploying again after a change of the checkpoint restarts all replicas. Raises
    ConfigError for an unknown or impossible argument, CheckpointError for a checkpoint that cannot be served.
    """
    settings = args if isinstance(args, AppSettings) else resolve(args)
    checkpoint = Checkpoint.open(settings.model)
    check_application(settings, checkpoint)
    return application(with_revision(settings, checkpoint), checkpoint)


def application(settings: AppSettings, checkpoint: Checkpoint) -> serve.Application:
    """Returns the application for `settings`, which name the revision of `checkpoint`; `check_application` has passed them."""
    arguments = to_arguments(settings)
    routers = serve.deployment(RouterReplica).options(**_options(settings, arguments, ROUTER))
    gateway = serve.deployment(GatewayReplica).options(**_options(settings, arguments, GATEWAY))
    experts = [
        serve.deployment(ExpertReplica)
        .options(**_options(settings, arguments, name, str(held)))
        .bind(arguments, str(held))
        for name, held in default_placement(settings, checkpoint).items()
    ]
    return gateway.bind(arguments, routers.bind(arguments), *experts)


def default_placement(settings: AppSettings, checkpoint: Checkpoint) -> dict[str, ExpertSet]:
    """Returns deployment name -> experts that each group and hot set holds without a placement: none for a hot set."""
    shape = expert_layout(checkpoint).shape
    groups = {
        f"experts-{group}": held for group, held in enumerate(shape.sliced_partition(settings.groups, settings.slices))
    }
    return {**groups, **{f"{HOT}{slot}": ExpertSet() for slot in range(settings.hot_sets)}}


def _options(settings: AppSettings, arguments: dict[str, Any], name: str, held: str = "") -> dict[str, Any]:
    """Returns Serve's options for deployment `name`: how many replicas, what each reserves, and how Serve treats them."""
    wanted = settings.scaling(name)
    options: dict[str, Any] = {
        "name": name,
        "ray_actor_options": {
            "num_cpus": wanted.num_cpus,
            "num_gpus": wanted.num_gpus,
            "resources": dict(wanted.resources),
        },
        # A killed replica is replaced in 2.2 s; with Serve's default of 10 s, in 3.7 to 5.7 s. A sick one is replaced after
        # three checks that fail, a stopped one after three that are not answered.
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 5.0,
        "graceful_shutdown_wait_loop_s": 0.1,  # no request goes through Serve, so there is none to wait for
        "graceful_shutdown_timeout_s": settings.drain_s + EXTRA_S,
    }
    if name in (ROUTER, GATEWAY) and wanted.min_replicas == wanted.max_replicas:
        return {**options, "num_replicas": wanted.min_replicas}
    # moiety.policy decides, with delays of its own; Serve carries its decisions out at once.
    scaling = AutoscalingConfig(
        min_replicas=wanted.min_replicas,
        initial_replicas=initial_replicas(settings, name),
        max_replicas=wanted.max_replicas,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs={"arguments": arguments, "held": held}),
    )
    return {**options, "autoscaling_config": scaling}
