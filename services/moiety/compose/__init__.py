"""The composition root: the only place that builds a service. Serve replicas and LocalCluster children both call it.

Each service's module is imported only when that service starts, so that an expert replica does not import what only routers
or gateways need. The replica imports transformers only if the layout of the checkpoint's experts is not cached yet.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from moiety.compose.background import at_low_priority
from moiety.compose.running import Running
from moiety.config.services import ExpertSettings, GatewaySettings, RouterSettings, ServiceSettings
from moiety.config.validate import validated
from moiety.core.replica import Role

__all__ = ["Running", "settings_of", "start"]


def settings_of(role: Role, values: Mapping[str, Any]) -> ServiceSettings:
    """Returns the settings of a service of `role`, made from `values`. Raises ConfigError if a value is wrong."""
    kinds: Mapping[Role, type[ServiceSettings]] = {
        Role.EXPERT: ExpertSettings,
        Role.ROUTER: RouterSettings,
        Role.GATEWAY: GatewaySettings,
    }
    return validated(kinds[role], values)


async def start(settings: ServiceSettings, *, replica_id: str, node: str) -> Running:
    """Starts an expert replica, a router or a gateway, depending on the type of `settings`."""
    launched = time.time()
    match settings:
        case ExpertSettings():
            # At low priority, because replicas are started while other replicas are busy.
            expert = await at_low_priority(import_module, "moiety.compose.expert")  # torch: a second or two
            running: Running = await expert.start(settings, replica_id, node, launched)
            return running
        case RouterSettings():
            from moiety.compose import router

            return await router.start(settings, replica_id, node)
        case GatewaySettings():
            from moiety.compose import gateway

            return await gateway.start(settings, replica_id, node)
    raise TypeError(f"{type(settings).__name__} is not the settings of a service")
