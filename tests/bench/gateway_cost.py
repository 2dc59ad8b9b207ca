"""Measures what a gateway adds to a request: choosing a router, and whole requests through a gateway to fake engines.

    python tests/bench/gateway_cost.py

Prints minima and medians over many repetitions: choosing takes microseconds, and other load on the machine adds to them.
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
from moiety.gateway.service import GenerationService
from moiety.gateway.text import Tokenizer
from moiety.internal.v1 import engine_pb2
from moiety.registry.memory import MemoryRegistry
from moiety.registry.watch import Watch
from moiety.synthetic.tokenizer import write_tokenizer
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, FakeEngine, fake_shape
from moiety.wire.deadline import Deadline
from moiety.wire.server import Server
from moiety.wire.service_names import GENERATION_SERVICE

ROUTERS, TOKENS, BLOCK = 16, 4096, 16
SHAPE = fake_shape(vocabulary=50_000, max_context=8192)
REPEATS = 5000


async def with_gateway(routers: int, scenario: Callable[[RouterPool, str], Awaitable[None]]) -> None:
    """Runs `scenario(pool, address)` with a real gateway in front of `routers` fake engines."""
    registry = MemoryRegistry(clock=lambda: 0.0)
    async with AsyncExitStack() as stack:
        for number in range(routers):
            engine = FakeEngine(f"r{number}", SHAPE, slots=64, blocks=1 << 14, block_tokens=BLOCK)
            await engine.start(registry)
            stack.push_async_callback(engine.vanish)
        watch = Watch(registry)
        await watch.start()
        stack.push_async_callback(watch.stop)
        pool = RouterPool(watch, 5.0)
        stack.push_async_callback(pool.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        write_tokenizer(folder)
        service = GenerationService(pool, Tokenizer(folder), "fake", 1024, NO_TRACER)
        server = Server([service.handler()], [GENERATION_SERVICE])
        address = f"{HOST}:{await server.start(HOST, 0)}"
        stack.push_async_callback(server.stop, 0)
        await scenario(pool, address)


async def measure_choice(pool: RouterPool, address: str) -> None:
    """Times choosing a router (hash, match, choose) and noting the visit.

    Measures both for new prompts and for prompts whose first half every router has seen.
    """
    generator = random.Random(0)
    first_half = [generator.randrange(SHAPE.vocabulary) for _ in range(TOKENS // 2)]
    async with Client(address) as client:
        for _ in range(4 * ROUTERS):
            prompt = first_half + [generator.randrange(SHAPE.vocabulary) for _ in range(TOKENS // 2)]
            async for _ in client.generate(prompt, max_tokens=2):
                pass
    for kind, beginning in (("new", []), ("first half known to every router", first_half)):
        request = engine_pb2.EngineRequest(prompt_ids=beginning)
        request.prompt_ids.extend(generator.randrange(SHAPE.vocabulary) for _ in range(TOKENS - len(beginning)))
        request.sampling.max_tokens = 64
        choice_s, visit_s = list[float](), list[float]()
        routers = await pool._ready(Deadline(), "")
        for _ in range(REPEATS):
            began = time.perf_counter()
            prompt = Prompt(request, pool._hasher)
            router = pool._choose(request, prompt, routers)
            choice_s.append(time.perf_counter() - began)
            attempt = Attempt(router, prompt, pool._pace)
            visit_s.append(time.perf_counter() - began - choice_s[-1])
            attempt.end(pool._pace)  # without an answer: this withdraws the visit
        for step, seconds in (("choosing a router", choice_s), ("noting the visit", visit_s)):
            print(
                f"{step}, {TOKENS} tokens ({kind}), {ROUTERS} routers: "
                f"{min(seconds) * 1e6:.0f} µs minimum, {statistics.median(seconds) * 1e6:.0f} µs median"
            )


async def measure_requests(_: RouterPool, address: str) -> None:
    """Prints the requests per second, one new token each, with client, gateway and engines on one event loop."""
    for tokens in (16, TOKENS):
        prompt = list(range(tokens))
        best = 0.0
        async with Client(address) as client:

            async def request_one_token(client: Client = client, prompt: list[int] = prompt) -> None:
                async for _ in client.generate(prompt, max_tokens=1):
                    pass

            for _ in range(10):
                began = time.perf_counter()
                await asyncio.gather(*(request_one_token() for _ in range(50)))
                best = max(best, 50 / (time.perf_counter() - began))
        print(f"client, gateway and fake engine in one process, {tokens} prompt tokens: {best:.0f} requests/s at best")


if __name__ == "__main__":
    asyncio.run(with_gateway(ROUTERS, measure_choice))
    asyncio.run(with_gateway(ROUTERS, measure_requests))
