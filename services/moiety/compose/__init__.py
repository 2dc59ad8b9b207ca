"""The one composition root: the only place that builds a service. Serve replicas and LocalCluster children both call it.

Each service's file is imported only when it is started, so that an expert replica never imports transformers.
"""

from __future__ import annotations

from moiety.compose.running import Running
from moiety.config import ExpertSettings, GatewaySettings, RouterSettings

__all__ = ["Running", "start_expert", "start_gateway", "start_router"]


async def start_expert(settings: ExpertSettings, *, replica_id: str, node: str) -> Running:
    """One replica of an expert group: reads its experts' weights and serves moiety.v1.Experts."""
    from moiety.compose.expert import start

    return await start(settings, replica_id, node)


async def start_router(settings: RouterSettings, *, replica_id: str, node: str) -> Running:
    """A router: every weight except the routed experts; serves moiety.v1.Engine."""
    from moiety.compose.router import start

    return await start(settings, replica_id, node)


async def start_gateway(settings: GatewaySettings, *, replica_id: str, node: str) -> Running:
    """A gateway: tokenises, streams text; serves moiety.v1.Generation."""
    from moiety.compose.gateway import start

    return await start(settings, replica_id, node)
