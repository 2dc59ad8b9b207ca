"""A real gateway service on loopback, over fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from moiety.client import Client
from moiety.gateway.core import GenerationCore, ServedModel
from moiety.gateway.grpc_service import GenerationService
from moiety.gateway.routers.router_pool import RouterPool
from moiety.gateway.text.encoder import PromptEncoder
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.model.checkpoint.chat_template import ChatTemplate
from moiety.model.checkpoint.generation_defaults import GenerationDefaults
from moiety.registry.memory import MemoryRegistry
from moiety.registry.watch import Watch
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, SYSTEM, FakeEngine, eventually
from moiety.wire.server import Server
from moiety.wire.service_names import GENERATION_SERVICE


@dataclass(slots=True)
class Gateway:
    """A running gateway, its client, and the registry of its routers."""

    core: GenerationCore
    address: str
    client: Client
    registry: MemoryRegistry
    watch: Watch
    routers: RouterPool
    received: int = 0  # tokens that `chunks` has received


@asynccontextmanager
async def gateway_over(
    tokenizer: Tokenizer,
    *engines: FakeEngine,
    router_wait_s: float = 5.0,
    max_concurrent: int = 16,
    within_s: float = 30.0,
    template: ChatTemplate | None = None,
    defaults: GenerationDefaults | None = None,
) -> AsyncIterator[Gateway]:
    """A running gateway over `engines`, for at most `within_s` seconds. At the end it waits until no request is running."""
    registry = MemoryRegistry(clock=lambda: 0.0)
    async with asyncio.timeout(within_s), AsyncExitStack() as stack:
        for engine in engines:
            await engine.start(registry)
            stack.push_async_callback(engine.vanish)
        watch = Watch(registry, interval_s=0.02)
        await watch.start()
        stack.push_async_callback(watch.stop)
        routers = RouterPool(watch, SYSTEM, router_wait_s)
        stack.push_async_callback(routers.close)
        encoder = PromptEncoder(tokenizer)
        served = ServedModel("fake", SYSTEM, routers, tokenizer, encoder, template, defaults or GenerationDefaults())
        core = GenerationCore(served, max_concurrent, NO_TRACER)
        server = Server(GenerationService(core).handlers(), [GENERATION_SERVICE])
        address = f"{HOST}:{await server.start(HOST, 0)}"
        stack.push_async_callback(server.stop, 0)
        client = await stack.enter_async_context(Client(address))
        yield Gateway(core, address, client, registry, watch, routers)
        await eventually(lambda: core.running == 0)
