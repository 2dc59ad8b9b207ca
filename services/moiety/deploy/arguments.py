"""Turns the application's arguments into the settings of each replica, and carries them between processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiety.config.application import HOT, AppSettings
from moiety.config.options import ExpertOptions, GatewayOptions, Options, RouterOptions, SystemOptions
from moiety.config.services import ExpertSettings, GatewaySettings, RouterSettings
from moiety.config.validate import validated
from moiety.core.address import EVERY_INTERFACE
from moiety.errors import ConfigError
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import pinned_revision

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHOWN = "without_secrets"  # key of a registry URL that lacks its password


def with_revision(settings: AppSettings, checkpoint: Checkpoint) -> AppSettings:
    """Returns `settings` with the revision of `checkpoint`, their model. Raises CheckpointError if another one is set."""
    return settings.model_copy(update={"revision": pinned_revision(checkpoint, settings.verify, settings.revision)})


def to_arguments(settings: AppSettings) -> dict[str, Any]:
    """Returns `settings` as plain values that Ray may store and log.

    Of a registry URL that holds a password, only what may be shown: each process reads the whole URL where it runs, see
    `from_arguments`.
    """
    values = settings.model_dump(mode="json")
    return {**values, "registry": {SHOWN: values["registry"]}} if settings.registry.holds_secret else values


def from_arguments(values: Mapping[str, Any]) -> AppSettings:
    """Returns the settings from which `to_arguments` made `values`. Called in the process that receives `values`.

    A registry URL with a password comes from this process's environment or secret files; nothing else does. Raises
    ConfigError if it is not there, or is another URL.
    """
    if not isinstance(values["registry"], Mapping):
        return validated(AppSettings, values)
    from moiety.config.resolve import from_surroundings  # takes 0.1 s to import, and only a secret URL needs it

    if (registry := from_surroundings().get("registry")) is None:
        raise ConfigError(
            "registry",
            None,
            "its URL has a password: set MOIETY_REGISTRY, or a file `registry` in MOIETY_SECRETS_DIR, for Ray on each node",
        )
    settings = validated(AppSettings, {**values, "registry": registry})
    if str(settings.registry) != (given := values["registry"][SHOWN]):
        raise ConfigError("registry", str(settings.registry), f"must be {given} with its password, as Serve was given")
    return settings


def initial_replicas(settings: AppSettings, deployment: str) -> int:
    """Returns how many replicas a deployment starts with: 0 for a hot set, else at least 1.

    A group that may scale to zero starts with one replica too, and keeps it until the group is known to be idle.
    """
    return 0 if deployment.startswith(HOT) else max(1, settings.scaling(deployment).min_replicas)


def expert_settings(settings: AppSettings, deployment: str, held: str, node_address: str) -> ExpertSettings:
    """Returns the settings of a replica of `deployment`, which holds `held` until a placement says otherwise."""
    values = _values(settings, settings.group(deployment), ExpertOptions, settings.listen_host, node_address)
    return ExpertSettings(**values, deployment=deployment, held=held)


def router_settings(settings: AppSettings, node_address: str) -> RouterSettings:
    """Returns the settings of a router replica. Raises ConfigError if the arguments contradict each other."""
    values = {
        **_values(settings, settings.router, RouterOptions, settings.listen_host, node_address),
        "overflow": settings.experts.overflow,
        "overflow_groups": {
            name: changes["overflow"] for name, changes in settings.overrides.items() if "overflow" in changes
        },
    }
    return validated(RouterSettings, values)


def gateway_settings(settings: AppSettings, node_address: str) -> GatewaySettings:
    """Returns the settings of a gateway replica, the only service with a fixed port."""
    listen_host = settings.gateway.listen_host or settings.listen_host
    return GatewaySettings(**_values(settings, settings.gateway, GatewayOptions, listen_host, node_address))


def _values(
    settings: AppSettings, deployment: Options, kind: type[Options], listen_host: str, node_address: str
) -> dict[str, Any]:
    """Returns the settings of a service: those of the system, and those of `deployment` that `kind` declares.

    The address to register is `advertise_host` if set, else `listen_host`, or the node's address if that is every interface.
    """
    return {
        **settings.model_dump(include=set(SystemOptions.model_fields)),
        **deployment.model_dump(include=set(kind.model_fields)),
        "listen_host": listen_host,
        "advertise_host": settings.advertise_host or (node_address if listen_host in EVERY_INTERFACE else listen_host),
    }
