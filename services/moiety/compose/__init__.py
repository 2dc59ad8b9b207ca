"""The composition root: the only place that builds a service. Serve replicas and LocalCluster children both call it.

Each service's module is imported only when that service starts, so that an expert replica does not import what only routers
or gateways need. The replica imports transformers only if the layout of the checkpoint's experts is not cached yet.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from moiety.compose.background import at_low_priority
from moiety.compose.running import Running
from moiety.config.services import ExpertSettings, GatewaySettings, RouterSettings, ServiceSettings
from moiety.config.validate import validated
from moiety.core.replica import Role

__all__ = ["Running", "settings_of", "start", "start_expert", "start_gateway", "start_router"]


async def start_expert(settings: ExpertSettings, *, replica_id: str, node: str) -> Running:
    """Starts a replica of an expert group: reads its experts' weights, serves moiety.internal.v1.ExpertService."""
    launched = time.time()
    return await (await at_low_priority(_expert)).start(settings, replica_id, node, launched)


def _expert() -> ModuleType:
    """Imports `compose.expert` and with it torch, which takes a second or two.

    `start_expert` calls this at low priority, because replicas are started while other replicas are busy.
    """
    from moiety.compose import expert

    return expert


async def start_router(settings: RouterSettings, *, replica_id: str, node: str) -> Running:
    """Starts a router: reads the trunk, serves moiety.internal.v1.EngineService."""
    from moiety.compose import router

    return await router.start(settings, replica_id, node)


async def start_gateway(settings: GatewaySettings, *, replica_id: str, node: str) -> Running:
    """Starts a gateway: reads the tokenizer, serves moiety.v1.GenerationService."""
    from moiety.compose import gateway

    return await gateway.start(settings, replica_id, node)


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
    match settings:
        case ExpertSettings():
            return await start_expert(settings, replica_id=replica_id, node=node)
        case RouterSettings():
            return await start_router(settings, replica_id=replica_id, node=node)
        case GatewaySettings():
            return await start_gateway(settings, replica_id=replica_id, node=node)
    raise TypeError(f"{type(settings).__name__} is not the settings of a service")
