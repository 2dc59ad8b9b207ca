"""A real gateway service on loopback, over fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from moiety.client import Chunk, Client
from moiety.gateway.core import GenerationCore, ServedModel
from moiety.gateway.grpc_service import GenerationService
from moiety.gateway.routers.router_pool import RouterPool
from moiety.gateway.text.encoder import PromptEncoder
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.registry.memory import MemoryRegistry
from moiety.registry.watch import Watch
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, SYSTEM, FakeEngine, eventually, fake_shape, fake_token
from moiety.wire.server import Server
from moiety.wire.service_names import GENERATION_SERVICE

SHAPE = fake_shape(max_context=64)
PROMPT = [5, 6, 7]


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
    tokenizer: Tokenizer, *engines: FakeEngine, router_wait_s: float = 5.0, max_concurrent: int = 16
) -> AsyncIterator[Gateway]:
    """A running gateway over `engines`, for at most 30 s. At the end it waits until no request is running."""
    registry = MemoryRegistry(clock=lambda: 0.0)
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        for engine in engines:
            await engine.start(registry)
            stack.push_async_callback(engine.vanish)
        watch = Watch(registry, interval_s=0.02)
        await watch.start()
        stack.push_async_callback(watch.stop)
        routers = RouterPool(watch, SYSTEM, router_wait_s)
        stack.push_async_callback(routers.close)
        served = ServedModel("fake", SYSTEM, routers, tokenizer, PromptEncoder(tokenizer))
        core = GenerationCore(served, max_concurrent, NO_TRACER)
        server = Server(GenerationService(core).handlers(), [GENERATION_SERVICE])
        address = f"{HOST}:{await server.start(HOST, 0)}"
        stack.push_async_callback(server.stop, 0)
        client = await stack.enter_async_context(Client(address))
        yield Gateway(core, address, client, registry, watch, routers)
        await eventually(lambda: core.running == 0)


def expected(max_tokens: int, prompt: list[int] = PROMPT, seed: int = 0) -> list[int]:
    """Returns the tokens that every fake engine generates."""
    return [fake_token(prompt, seed, position, SHAPE.vocabulary) for position in range(max_tokens)]


async def tokens(gateway: Gateway, max_tokens: int = 6, **options: object) -> list[int]:
    """Sends one request of PROMPT, seed 0; returns all its tokens."""
    return [token for chunk in await chunks(gateway, max_tokens=max_tokens, **options) for token in chunk.token_ids]


async def chunks(gateway: Gateway, prompt: str | list[int] = PROMPT, **options: object) -> list[Chunk]:
    """Sends one request; returns all its chunks."""
    got = []
    async for chunk in gateway.client.generate(prompt, **{"seed": 0, **options}):  # type: ignore[arg-type]
        gateway.received += len(chunk.token_ids)
        got.append(chunk)
    return got


def die_before(gateway: Gateway, position: int, *routers: FakeEngine, choices: int = 1) -> None:
    """Makes the first of `routers` that reaches token `position` vanish instead of generating it; the others go on.

    It vanishes once the client has all earlier tokens: tokens on their way when a router dies may or may not arrive.
    """
    vanishing: list[asyncio.Task[None]] = []

    async def vanish(router: FakeEngine) -> None:
        await eventually(lambda: gateway.received >= choices * position)
        await router.vanish()

    def kill(router: FakeEngine) -> Callable[[int], Awaitable[None]]:
        async def before_token(at: int) -> None:
            if at == position and not vanishing:
                vanishing.append(asyncio.create_task(vanish(router)))
                await asyncio.Event().wait()

        return before_token

    for router in routers:
        router.before_token = kill(router)
