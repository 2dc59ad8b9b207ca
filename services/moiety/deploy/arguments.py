"""From the application's arguments to the settings of each replica, and how the arguments travel between processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moiety.config.application import HOT, AppSettings
from moiety.config.resolve import resolve, validated
from moiety.config.services import ExpertSettings, GatewaySettings, RouterSettings
from moiety.errors import ConfigError
from moiety.registry.urls import without_secrets

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def carried(settings: AppSettings) -> dict[str, Any]:
    """`settings` as plain values that Ray may store and log.

    A registry URL that holds a password is left out: each process reads it from MOIETY_REGISTRY in its own environment.
    """
    values = settings.model_dump(mode="json")
    if without_secrets(settings.registry) != settings.registry:
        del values["registry"]
    return values


def restored(values: Mapping[str, Any]) -> AppSettings:
    """The inverse of `carried`, in the process that got the values.

    Raises ConfigError where the registry was withheld and this process has no MOIETY_REGISTRY.
    """
    settings = resolve(AppSettings, values)
    if "registry" not in settings.model_fields_set:
        raise ConfigError(
            "registry", None, "has a password, so MOIETY_REGISTRY must be set where Ray runs, on each node"
        )
    return settings


def initial_replicas(settings: AppSettings, deployment: str) -> int:
    """How many replicas a scaled deployment starts with: a group that may be empty has one until it is known to idle."""
    return 0 if deployment.startswith(HOT) else max(1, settings.group(deployment).min_replicas)


def expert_settings(settings: AppSettings, deployment: str, held: str, node_address: str) -> ExpertSettings:
    """Settings of one replica of the expert group `deployment` that holds `held` until a placement says otherwise."""
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
    """Settings of a router replica. Raises ConfigError where the arguments contradict each other."""
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
        "overflow_groups": {name: own["overflow"] for name, own in settings.overrides.items() if "overflow" in own},
        "overflow_queue_ms": settings.overflow_queue_ms,
    }
    return validated(RouterSettings, values)


def gateway_settings(settings: AppSettings, node_address: str) -> GatewaySettings:
    """Settings of a gateway replica, the only one with a port that is known beforehand."""
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
    """Loopback stays loopback: a service that listens there can't be reached by the node's address."""
    if settings.advertise_host:
        return settings.advertise_host
    return settings.listen_host if settings.listen_host in LOOPBACK else node_address
