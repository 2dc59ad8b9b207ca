"""Turns the application's arguments into the settings of each replica, and carries them between processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiety.config.application import HOT, AppSettings
from moiety.config.resolve import resolve, validated
from moiety.config.services import ExpertSettings, GatewaySettings, RouterSettings
from moiety.errors import ConfigError
from moiety.registry.urls import without_secrets

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def to_arguments(settings: AppSettings) -> dict[str, Any]:
    """Returns `settings` as plain values that Ray may store and log.

    A registry URL that holds a password is left out: each process reads it from MOIETY_REGISTRY in its own environment.
    """
    values = settings.model_dump(mode="json")
    if without_secrets(settings.registry) != settings.registry:
        del values["registry"]
    return values


def from_arguments(values: Mapping[str, Any]) -> AppSettings:
    """Returns the settings from which `to_arguments` made `values`. Called in the process that receives `values`.

    Raises ConfigError if the registry URL was left out and MOIETY_REGISTRY is not set in this process.
    """
    settings = resolve(AppSettings, values)
    if "registry" not in settings.model_fields_set:
        raise ConfigError(
            "registry", None, "its URL has a password: set MOIETY_REGISTRY in the environment of Ray, on each node"
        )
    return settings


def initial_replicas(settings: AppSettings, deployment: str) -> int:
    """Returns how many replicas a deployment that scales by load starts with: 0 for a hot set, else at least 1.

    A group that may scale to zero starts with one replica too, and keeps it until the group is known to be idle.
    """
    return 0 if deployment.startswith(HOT) else max(1, settings.group(deployment).min_replicas)


def expert_settings(settings: AppSettings, deployment: str, held: str, node_address: str) -> ExpertSettings:
    """Returns the settings of a replica of `deployment`, which holds `held` until a placement says otherwise."""
    group = settings.group(deployment)
    return ExpertSettings(
        **_shared(settings, node_address),
        deployment=deployment,
        held=held,
        threads=group.threads,
        weights=group.weights,
        slices=settings.slices,
        deterministic=settings.deterministic,
        capacity=group.capacity,
    )


def router_settings(settings: AppSettings, node_address: str) -> RouterSettings:
    """Returns the settings of a router replica. Raises ConfigError if the arguments contradict each other."""
    values = {
        **_shared(settings, node_address),
        "deterministic": settings.deterministic,
        "slices": settings.slices,
        "slots": settings.slots,
        "token_budget": settings.token_budget,
        "max_context": settings.max_context,
        "kv_memory": settings.kv_memory,
        "expert_wait_s": settings.expert_wait_s,
        "transport": settings.transport,
        "prefix_cache": settings.prefix_cache,
        "speculative_tokens": settings.speculative_tokens,
        "lanes": settings.lanes,
        "overflow": settings.experts.overflow,
        "overflow_groups": {
            name: changes["overflow"] for name, changes in settings.overrides.items() if "overflow" in changes
        },
        "overflow_queue_ms": settings.overflow_queue_ms,
    }
    return validated(RouterSettings, values)


def gateway_settings(settings: AppSettings, node_address: str) -> GatewaySettings:
    """Returns the settings of a gateway replica, the only service with a fixed port."""
    return GatewaySettings(**_shared(settings, node_address), port=settings.grpc_port)


def _shared(settings: AppSettings, node_address: str) -> dict[str, Any]:
    return {
        "model": settings.model,
        "served_name": settings.served_name,
        "app": settings.app,
        "registry": settings.registry,
        "listen_host": settings.listen_host,
        "advertise_host": _advertised(settings, node_address),
        "dtype": settings.dtype,
        "device": settings.device,
    }


def _advertised(settings: AppSettings, node_address: str) -> str:
    """Returns the address to register: `advertise_host` if set, `listen_host` if it is loopback, else the node's address."""
    if settings.advertise_host:
        return settings.advertise_host
    return settings.listen_host if settings.listen_host in LOOPBACK else node_address
