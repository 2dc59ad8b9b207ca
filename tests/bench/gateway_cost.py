"""What a gateway adds to a request: the choice of a router, and a whole request through a gateway and fake engines.

    python tests/bench/gateway_cost.py

Prints minima and medians over many repetitions: choosing is microseconds, and anything else on the machine adds to it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from moiety.client import Client
from moiety.gateway.attempt import Attempt
from moiety.gateway.prompt import Prompt
from moiety.gateway.router_pool import RouterPool
from moiety.gateway.service import SERVICE, GenerationService
from moiety.gateway.text import Tokenizer
from moiety.internal.v1 import engine_pb2
from moiety.registry.memory import MemoryRegistry
from moiety.registry.watch import Watch
from moiety.synthetic.tokenizer import write_tokenizer
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, FakeEngine, fake_shape
from moiety.wire.channels import Server
from moiety.wire.deadline import Deadline

ROUTERS, TOKENS, BLOCK = 16, 4096, 16
SHAPE = fake_shape(vocabulary=50_000, max_context=8192)
REPEATS = 5000


async def gateway(routers: int, scenario: Callable[[RouterPool, str], Awaitable[None]]) -> None:
    """`scenario` with a real gateway over that many fake engines."""
    registry = MemoryRegistry(clock=lambda: 0.0)
    async with AsyncExitStack() as stack:
        for number in range(routers):
            engine = FakeEngine(f"r{number}", SHAPE, slots=64, blocks=1 << 14, block_tokens=BLOCK)
            await engine.start(registry)
            stack.push_async_callback(engine.vanish)
        watch = Watch(registry)
        await watch.start()
        stack.push_async_callback(watch.stop)
        known = RouterPool(watch, 5.0)
        stack.push_async_callback(known.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        write_tokenizer(folder)
        service = GenerationService(known, Tokenizer(folder), "fake", 1024, NO_TRACER)
        server = Server([service.handler()], [SERVICE])
        address = f"{HOST}:{await server.start(HOST, 0)}"
        stack.push_async_callback(server.stop, 0)
        await scenario(known, address)


async def choosing(known: RouterPool, address: str) -> None:
    """Hash, match and choose, and what noting the visit costs: for new prompts, and for some half of which all have."""
    drawn = random.Random(0)
    half = [drawn.randrange(SHAPE.vocabulary) for _ in range(TOKENS // 2)]
    async with Client(address) as client:
        for _ in range(4 * ROUTERS):
            prompt = half + [drawn.randrange(SHAPE.vocabulary) for _ in range(TOKENS // 2)]
            async for _ in client.generate(prompt, max_tokens=2):
                pass
    for what, beginning in (("new", []), ("half known everywhere", half)):
        request = engine_pb2.EngineRequest(prompt_ids=beginning)
        request.prompt_ids.extend(drawn.randrange(SHAPE.vocabulary) for _ in range(TOKENS - len(beginning)))
        request.sampling.max_tokens = 64
        chosen, noted = list[float](), list[float]()
        routers = await known._ready(Deadline(), "")
        for _ in range(REPEATS):
            began = time.perf_counter()
            prompt = Prompt(request, known._hasher)
            router = known._choose(request, prompt, routers)
            chosen.append(time.perf_counter() - began)
            attempt = Attempt(router, prompt, known._pace)
            noted.append(time.perf_counter() - began - chosen[-1])
            attempt.end(known._pace)  # unanswered: what it noted is withdrawn
        for step, seconds in (("choosing a router", chosen), ("noting the visit", noted)):
            print(
                f"{step}, {TOKENS} tokens ({what}), {ROUTERS} routers: "
                f"{min(seconds) * 1e6:.0f} µs at least, {statistics.median(seconds) * 1e6:.0f} µs in the median"
            )


async def whole(_: RouterPool, address: str) -> None:
    """Requests per second of one token each, client, gateway and engines on this process's loop."""
    for tokens in (16, TOKENS):
        prompt = list(range(tokens))
        best = 0.0
        async with Client(address) as client:

            async def one(client: Client = client, prompt: list[int] = prompt) -> None:
                async for _ in client.generate(prompt, max_tokens=1):
                    pass

            for _ in range(10):
                began = time.perf_counter()
                await asyncio.gather(*(one() for _ in range(50)))
                best = max(best, 50 / (time.perf_counter() - began))
        print(f"client, gateway and fake engine in one process, {tokens} prompt tokens: {best:.0f} requests/s at best")


if __name__ == "__main__":
    asyncio.run(gateway(ROUTERS, choosing))
    asyncio.run(gateway(ROUTERS, whole))
