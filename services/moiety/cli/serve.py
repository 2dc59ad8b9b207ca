"""`moiety serve`."""

from __future__ import annotations

import json
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from moiety.cli.options import ModelName, local_model, revision_option
from moiety.cli.run import Interrupted, Signals, progress, signals_interrupt
from moiety.cli.setting_options import Assignment, setting_option
from moiety.config.application import AppSettings
from moiety.config.registry_url import RegistryUrl
from moiety.config.resolve import merged, nested, resolve
from moiety.config.run_folder import run_folder
from moiety.config.running_systems import recorded


@click.command()
@click.argument("model", type=ModelName())
@revision_option
@setting_option("--groups", "groups")
@setting_option("--max-replicas", "experts.max_replicas")
@setting_option("--hot-sets", "hot_sets")
@setting_option("--registry", "registry", default="this command starts its own Redis")
@setting_option("--grpc-port", "gateway.port")
@setting_option("--http-port", "gateway.http_port")
@setting_option("--slots", "router.slots")
@setting_option("--kv-memory", "router.kv_memory")
@setting_option("--app", "app")
@setting_option("--dtype", "dtype")
@setting_option("--verify", "verify")
@click.option(
    "--set",
    "assignments",
    type=Assignment(),
    multiple=True,
    help="Any other setting, by its name in `moiety settings`, such as router.lanes=2. Repeatable.",
)
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False), help="YAML file of settings; options override it."
)
@click.option("--ray-address", help="An existing Ray: auto, or host:port.  [default: this command starts its own Ray]")
@click.option("--dashboard", is_flag=True, help="Start Ray's dashboard on 127.0.0.1 (needs ray[default]).")
def serve(model: str, hub_revision: str | None, ray_address: str | None, dashboard: bool, **options: Any) -> None:
    """Serve a checkpoint on Ray: gateway, router and elastic expert groups.

    MODEL is a checkpoint folder, or a Hugging Face id. Of an id, what is needed is first downloaded to Hugging Face's
    cache on this machine. On several machines, each needs the folder under the same path.

    Starts Ray and Redis unless you name existing ones, prints the gateway's addresses, and runs until Ctrl-C, SIGTERM or
    SIGHUP, which a terminal sends when it closes. Then it stops what it started: new requests are refused, running ones get
    `drain_s` seconds to finish. A second signal stops at once; replicas on an existing Ray still finish first. Exit status: 130
    after Ctrl-C, else 0, but 143 or 129 if SIGTERM or SIGHUP came first and a second signal after it.

    `moiety settings` lists all settings. An option goes before a MOIETY_* environment variable, that before a file in the
    folder MOIETY_SECRETS_DIR, and that before the YAML file of --config.

    \b
    Examples:
      moiety serve ./Mixtral-8x7B-v0.1 --groups 4
      moiety serve Qwen/Qwen3-30B-A3B --revision main
      moiety serve ./Mixtral-8x7B-v0.1 --set router.threads=8 --set overrides.experts-1.max_replicas=8
    """
    show = progress()
    with _ended_by_signals(show) as signals, ExitStack() as ends:
        settings = read_settings(model, **options)  # before anything is downloaded, or imported for seconds
        folder = local_model(model, hub_revision)
        name = settings.served_name or (Path(folder).absolute().name if Path(model).is_dir() else model)
        settings = settings.model_copy(update={"model": folder, "served_name": name})
        from moiety.deploy.run import deploy_app
        from moiety.registry.embedded_redis import EmbeddedRedis

        record = ends.enter_context(
            recorded(settings.app, name, show, checkpoint=str(Path(folder).absolute()), ray_address=ray_address or "")
        )
        if "registry" not in settings.model_fields_set:
            redis = ends.enter_context(EmbeddedRedis())
            settings = settings.model_copy(update={"registry": RegistryUrl(redis.url)})
            show(f"Redis: {redis.url}")
        run = None if ray_address else ends.enter_context(run_folder("serve", show))
        record(registry=settings.registry.get_secret_value(), logs=str(run / "session_latest" / "logs") if run else "")
        deployed = ends.enter_context(
            deploy_app(
                settings,
                address=ray_address,
                dashboard=dashboard,
                ray_folder=run,
                progress=show,
                wait_s=1800.0,
                hurried=signals.again,
            )
        )
        record(ready=True, grpc=deployed.gateways, http=deployed.http, system=str(deployed.system))
        for gateway in deployed.gateways:
            click.echo(f"ready: gRPC moiety.v1.GenerationService at {gateway}")
        for gateway in deployed.http:
            click.echo(f"ready: OpenAI HTTP API at http://{gateway}/v1")
        click.echo('try:   moiety generate "Hello"')
        if deployed.http:
            request = json.dumps({"model": name, "prompt": "Hello"}, ensure_ascii=False)
            click.echo(f"or:    curl http://{deployed.http[0]}/v1/completions --json {shlex.quote(request)}")
        click.echo("look:  moiety status, moiety logs")
        click.echo("Ctrl-C or `moiety stop` stops it, once running requests have finished; a second Ctrl-C at once.")
        threading.Event().wait()


@contextmanager
def _ended_by_signals(say: Callable[[str], None]) -> Iterator[Signals]:
    """As `signals_interrupt`, but only Ctrl-C and an end in a hurry are errors: to end is what the other signals ask for."""
    try:
        with signals_interrupt() as signals:
            yield signals
    except Interrupted as interruption:
        if interruption.number == signal.SIGINT or signals.again():
            raise
        say(f"ended by {signal.Signals(interruption.number).name}")


def read_settings(
    model: str, config: str | None, assignments: Sequence[Mapping[str, Any]], **options: Any
) -> AppSettings:
    """Returns the settings that the command's options, the environment and the file `config` give.

    `options` are those that stand for one setting, named as `setting_option` passes them. An assignment of --set wins.
    """
    given = [nested(name.replace("__", "."), value) for name, value in options.items() if value is not None]
    return resolve(merged({"model": model}, *given, *assignments), config)
