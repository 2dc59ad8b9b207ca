"""Builds a gateway."""

from __future__ import annotations

import asyncio
import secrets
import time

from moiety.compose.running import Parts, Running, Site
from moiety.config import GatewaySettings
from moiety.core import Busy, Role
from moiety.gateway.routers import Routers
from moiety.gateway.service import SERVICE, GenerationService
from moiety.gateway.text import Tokenizer
from moiety.load.watch import Watch
from moiety.model.checkpoint import Checkpoint
from moiety.model.revision import revision
from moiety.wire.channels import Server


async def start(settings: GatewaySettings, replica_id: str, node: str) -> Running:
    """Reads the tokenizer, follows the registry for routers, serves the public API."""
    async with Site(settings, settings.deployment, replica_id, node) as site:
        checkpoint = await asyncio.to_thread(Checkpoint.open, settings.model)
        of = await asyncio.to_thread(revision, checkpoint)
        tokenizer = await asyncio.to_thread(Tokenizer, settings.model)
        watch = Watch(site.registry)
        await watch.start()
        site.closers.push_async_callback(watch.stop)
        routers = Routers(watch, settings.router_wait_s, seed=secrets.randbits(64))
        site.closers.push_async_callback(routers.close)
        service = GenerationService(routers, tokenizer, settings.name, settings.max_concurrent, site.tracer)
        begun, since = 0, time.monotonic()

        def load_since_last() -> Busy:
            nonlocal begun, since
            now = time.monotonic()
            requests_per_s = (service.begun - begun) / max(now - since, 1e-6)
            begun, since = service.begun, now
            busy = min(1.0, service.running / settings.max_concurrent)  # nothing waits here
            return Busy(busy, 0.0, requests_per_s, requests_per_s)

        return await site.serve(
            Parts(
                role=Role.GATEWAY,
                deployment=settings.deployment,
                revision=of,
                server=Server([service.handler()], [SERVICE], share_port=settings.port != 0),
                idle=lambda: service.running == 0,
                on_beat=(site.tells(load_since_last),),
            )
        )
