"""`moiety serve`."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from moiety.cli.options import dtype_option
from moiety.cli.run import progress, signals_interrupt


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--groups", type=click.IntRange(1, 4096), help="Expert groups, one deployment each.  [default: 2]")
@click.option("--max-replicas", type=click.IntRange(1, 1000), help="Most replicas per expert group.  [default: 4]")
@click.option(
    "--hot-sets", type=click.IntRange(0, 256), help="Small deployments for the hottest experts.  [default: 0]"
)
@click.option(
    "--registry", help="URL of a Redis: redis://… or rediss://…  [default: this command starts its own Redis]"
)
@click.option(
    "--grpc-port", type=click.IntRange(0, 65535), help="Port of the gateway; 0: any free port.  [default: 50051]"
)
@click.option("--slots", type=click.IntRange(1, 4096), help="Sequences that run at once.  [default: 32]")
@click.option("--kv-memory", help="Memory for the KV cache, such as 4GiB.  [default: 1GiB]")
@click.option("--app", help="Name of the application, and prefix of its registry keys.  [default: moiety]")
@click.option("--ray-address", help="An existing Ray: auto, or host:port.  [default: this command starts its own Ray]")
@click.option("--dashboard", is_flag=True, help="Start Ray's dashboard on 127.0.0.1 (needs ray[default]).")
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False), help="YAML file with AppSettings; options override it."
)
@dtype_option("auto")
def serve(model: Path, ray_address: str | None, dashboard: bool, config: str | None, **flags: Any) -> None:
    """Serve a checkpoint on Ray: gateway, router and elastic expert groups.

    MODEL is a checkpoint folder. Starts Ray and Redis unless you name existing ones, prints the gateway's address, and
    runs until Ctrl-C. Then it stops only what it started. Requests that are still running may be cut off.

    \b
    Example:
      moiety serve ./Mixtral-8x7B-v0.1 --groups 4
    """
    from moiety.config.application import AppSettings, GroupSettings
    from moiety.config.resolve import resolve, validated
    from moiety.deploy.run import deploy_app
    from moiety.registry.embedded_redis import EmbeddedRedis

    show = progress()
    max_replicas = flags.pop("max_replicas")
    settings = resolve(AppSettings, {**flags, "model": str(model)}, config)
    if max_replicas is not None:  # sets one field of the group settings; the config file may set the others
        experts = {**settings.experts.model_dump(), "max_replicas": max_replicas}
        settings = settings.model_copy(update={"experts": validated(GroupSettings, experts)})
    with signals_interrupt(), ExitStack() as ends:
        if "registry" not in settings.model_fields_set:
            redis = ends.enter_context(EmbeddedRedis())
            settings = settings.model_copy(update={"registry": redis.url})
            show(f"Redis: {redis.url}")
        deployed = ends.enter_context(
            deploy_app(settings, address=ray_address, dashboard=dashboard, progress=show, wait_s=1800.0)
        )
        for gateway in deployed.gateways:
            click.echo(f"ready: gRPC moiety.v1.GenerationService at {gateway}")
        click.echo(f'try:   moiety generate "Hello" --address {deployed.gateways[0]}')
        click.echo("Ctrl-C stops it.")
        threading.Event().wait()
