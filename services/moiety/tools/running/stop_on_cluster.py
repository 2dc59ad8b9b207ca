"""Ends an application on a Ray cluster that goes on running, and deletes what it left in the registry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from moiety.config.application import AppSettings
from moiety.core.system import SystemId
from moiety.deploy.ray_cluster import existing_ray
from moiety.deploy.shutdown import end_application
from moiety.errors import NotFound, RegistryUnreachable, Unavailable
from moiety.registry.connect import forget, live_systems


def stop_on_cluster(address: str, settings: AppSettings, *, now: bool, progress: Callable[[str], None]) -> None:
    """Deletes application `settings.app` of the Ray at `address`; returns once its replicas have ended.

    Running requests finish first, as the application's settings allow. `now`: returns at once, while they do. What the
    application leaves in the registry is deleted if it has ended and `settings` name the registry; else it expires. Raises
    NotFound, with the applications that are there, if there is no such one, Unavailable if replicas are left at the end.
    """
    registry = settings.registry.get_secret_value() if "registry" in settings.model_fields_set else ""
    with existing_ray(address):
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # `progress` reports the same
        if settings.app not in (there := serve.status().applications):
            names = ", ".join(sorted(there)) or "none"
            raise NotFound(f"no application {settings.app!r} on the Ray at {address}: its applications: {names}")
        cluster = settings.cluster or ray.get_runtime_context().get_session_name()
        systems = _systems(registry, settings.app, cluster) if registry else ()
        ended = end_application(settings.app, progress, registry=registry, hurried=lambda: now)
    if not ended and now:
        progress(f"{settings.app} ends: its running requests have up to `drain_s` seconds to finish")
        return
    if not ended:
        raise Unavailable(f"{settings.app} has not ended in the time that its settings give: its replicas go on ending")
    for system in systems:
        asyncio.run(forget(registry, system))
    progress(f"{settings.app} has ended")


def _systems(registry: str, app: str, cluster: str) -> Sequence[SystemId]:
    """Returns the systems of `app` that the cluster runs; none if the registry does not answer."""
    with suppress(RegistryUnreachable):
        return [one for one in asyncio.run(live_systems(registry, app)) if one.cluster == cluster]
    return ()
