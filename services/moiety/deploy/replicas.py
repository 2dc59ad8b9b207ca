"""The classes of the Serve deployments. Each starts one service through `compose` and passes Serve's calls on to it.

Serve pickles what is in this module, so it holds no clients, locks or other live objects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve

from moiety import compose
from moiety.config.application import AppSettings
from moiety.config.services import ServiceSettings
from moiety.deploy.arguments import expert_settings, gateway_settings, router_settings
from moiety.deploy.ray_cluster import settings_of_process
from moiety.deploy.shutdown import is_ending
from moiety.deploy.start_failure import start_explained
from moiety.errors import MoietyError

_log = logging.getLogger(__name__)


class _Replica:
    """Base of the three deployment classes: health checks, live settings, and drain before the end."""

    _running: compose.Running | None = None
    _drain_s: float = 0.0

    async def _start(
        self, arguments: Mapping[str, Any], settings_of: Callable[[AppSettings, str], ServiceSettings]
    ) -> None:
        """Starts the service whose settings `settings_of` makes from those of the application and this node's address."""
        with start_explained():
            settings = settings_of(settings_of_process(arguments), ray.util.get_node_ip_address())
            self._drain_s = settings.drain_s
            replica_id: str = serve.get_replica_context().replica_id.unique_id
            node: str = ray.get_runtime_context().get_node_id()
            self._running = await compose.start(settings, replica_id=replica_id, node=node)

    async def check_health(self) -> None:
        """Raises if this replica should be replaced. Serve calls it every second."""
        if self._running is not None:
            self._running.healthy()

    async def reconfigure(self, user_config: Mapping[str, Any] | None) -> None:
        """Applies `user_config`; Serve calls it after start and at every change.

        Refused values change nothing. They are reported in the log and in the registry entry. An error would make Serve end
        the replica, and each that it starts in its place.
        """
        if self._running is not None and user_config is not None:
            try:
                await self._running.reconfigure(user_config)
            except MoietyError as error:
                _log.error("%s goes on with its earlier live settings: %s", self._running.replica.id, error)

    async def __del__(self) -> None:
        """Drains and closes the service. Serve awaits this once before it ends a replica, but not if the replica is killed."""
        running, self._running = self._running, None
        if running is not None:
            app: str = serve.get_replica_context().app_name
            try:
                await running.drain(self._drain_s, ending=await is_ending(app))
            finally:
                await running.close()


class ExpertReplica(_Replica):
    """One replica of an expert group or hot set; its deployment has the name of the group or hot set."""

    async def __init__(self, arguments: Mapping[str, Any], held: str) -> None:  # type: ignore[misc]  # Serve awaits it
        deployment = serve.get_replica_context().deployment
        await self._start(arguments, lambda settings, address: expert_settings(settings, deployment, held, address))


class RouterReplica(_Replica):
    """One replica of the router deployment."""

    async def __init__(self, arguments: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        await self._start(arguments, router_settings)


class GatewayReplica(_Replica):
    """One replica of the gateway, the application's ingress deployment.

    The other deployments are bound to it only so that Serve deploys them too: tokens do not go through Serve's handles.
    """

    async def __init__(self, arguments: Mapping[str, Any], *_bound: object) -> None:  # type: ignore[misc]  # Serve awaits it
        await self._start(arguments, gateway_settings)
