"""Builds a gateway."""

from __future__ import annotations

import asyncio
import secrets
import time

from moiety.compose.running import Running, ServiceStart
from moiety.compose.service_parts import ServiceParts
from moiety.config.services import GatewaySettings
from moiety.core.load import ReplicaLoad
from moiety.core.replica import Role
from moiety.gateway.core import GenerationCore, ServedModel
from moiety.gateway.grpc_service import GenerationService
from moiety.gateway.http.app import build_app
from moiety.gateway.routers.router_pool import RouterPool
from moiety.gateway.text.encoder import PromptEncoder
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.model.checkpoint.generation_defaults import GenerationDefaults
from moiety.registry.watch import Watch
from moiety.wire.http.connection import Limits
from moiety.wire.http.identity import Owner, identified
from moiety.wire.http.server import HttpServer
from moiety.wire.server import Server, public_door
from moiety.wire.service_names import GENERATION_SERVICE
from moiety.wire.shared_port import check_ports, listening_at_all


async def start(settings: GatewaySettings, replica_id: str, node: str) -> Running:
    """Starts a gateway: reads the tokenizer, follows the registry for routers, serves the public APIs."""
    async with ServiceStart(settings, replica_id, node) as startup:
        await check_ports(settings, startup.system)  # before anything is loaded
        tokenizer = await asyncio.to_thread(Tokenizer, settings.model)
        if (template := await asyncio.to_thread(tokenizer.chat_template)) is not None:
            startup.closers.callback(template.close)
        defaults = GenerationDefaults.open(settings.model)
        watch = Watch(startup.registry)
        await watch.start()
        startup.closers.push_async_callback(watch.stop)
        routers = RouterPool(watch, startup.system, settings.router_wait_s, seed=secrets.randbits(64))
        startup.closers.push_async_callback(routers.close)
        encoder = PromptEncoder(tokenizer)
        served = ServedModel(settings.name, startup.system, routers, tokenizer, encoder, template, defaults)
        core = GenerationCore(served, settings.max_concurrent, startup.tracer)
        startup.closers.callback(core.close)
        begun, since = 0, time.monotonic()

        def load_since_last() -> ReplicaLoad:
            nonlocal begun, since
            now = time.monotonic()
            requests_per_s = (core.begun - begun) / max(now - since, 1e-6)
            begun, since = core.begun, now
            busy = min(1.0, core.running / settings.max_concurrent)  # requests wait at the routers, not here
            return ReplicaLoad(busy, 0.0, requests_per_s, requests_per_s)

        return await startup.serve(
            ServiceParts(
                role=Role.GATEWAY,
                server=Server(
                    GenerationService(core).handlers(),
                    [GENERATION_SERVICE],
                    share_port=settings.port != 0,
                    door=public_door(settings.max_connection_age_s, settings.max_connection_age_grace_s),
                    streams=2 * settings.max_concurrent,  # half of them to be refused with a retry delay
                ),
                port=settings.port,
                http=_http_server(core, settings) if settings.http else None,
                http_port=settings.http_port,
                listening=listening_at_all(settings, startup.system),
                idle=lambda: core.running == 0,
                work=lambda: core.begun,
                refuse=core.refuse,
                cut=core.end,
                on_beat=(startup.load_beat(load_since_last),),
            )
        )


def _http_server(core: GenerationCore, settings: GatewaySettings) -> HttpServer:
    api = build_app(core, formats=settings.tool_format)
    app = identified(api, Owner(core.model.name, str(core.model.system)))
    limits = Limits(connections=2 * settings.max_concurrent)  # half of them to be refused with a retry delay
    return HttpServer(app, limits, share_port=settings.http_port != 0)
