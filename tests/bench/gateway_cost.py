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
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from moiety.client import Client
from moiety.gateway.core import GenerationCore, ServedModel
from moiety.gateway.grpc_service import GenerationService
from moiety.gateway.routers.attempt import Attempt
from moiety.gateway.routers.prefixes import PrefixHasher
from moiety.gateway.routers.prompt import Prompt
from moiety.gateway.routers.router_peer import RouterPeer
from moiety.gateway.routers.router_pool import RouterPool
from moiety.gateway.text.encoder import PromptEncoder
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.internal.v1 import engine_pb2
from moiety.policy.router_choice import choose
from moiety.policy.router_pace import Pace
from moiety.registry.memory import MemoryRegistry
from moiety.registry.watch import Watch
from moiety.synthetic.tokenizer import write_tokenizer
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, SYSTEM, FakeEngine, fake_shape
from moiety.wire.server import Server
from moiety.wire.service_names import GENERATION_SERVICE

ROUTERS, TOKENS, BLOCK = 16, 4096, 16
SHAPE = fake_shape(vocabulary=50_000, max_context=8192)
REPEATS = 5000


@asynccontextmanager
async def fake_routers() -> AsyncIterator[MemoryRegistry]:
    """Yields a registry that lists ROUTERS fake engines, which run meanwhile."""
    registry = MemoryRegistry(clock=lambda: 0.0)
    async with AsyncExitStack() as stack:
        for number in range(ROUTERS):
            engine = FakeEngine(f"r{number}", SHAPE, slots=64, blocks=1 << 14, block_tokens=BLOCK)
            await engine.start(registry)
            stack.push_async_callback(engine.vanish)
        yield registry


@asynccontextmanager
async def gateway_over(registry: MemoryRegistry) -> AsyncIterator[str]:
    """Yields the address of a real gateway in front of the registry's routers."""
    async with AsyncExitStack() as stack:
        watch = Watch(registry)
        await watch.start()
        stack.push_async_callback(watch.stop)
        pool = RouterPool(watch, SYSTEM, 5.0)
        stack.push_async_callback(pool.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        write_tokenizer(folder)
        tokenizer = Tokenizer(folder)
        served = ServedModel("fake", SYSTEM, pool, tokenizer, PromptEncoder(tokenizer))
        server = Server(GenerationService(GenerationCore(served, 1024, NO_TRACER)).handlers(), [GENERATION_SERVICE])
        address = f"{HOST}:{await server.start(HOST, 0)}"
        stack.push_async_callback(server.stop, 0)
        yield address


async def measure_choice(registry: MemoryRegistry) -> None:
    """Times choosing a router (hash, match, choose) and noting the visit.

    Measures both for new prompts and for prompts whose first half every router has seen.
    """
    routers = [router for replica in await registry.replicas() if (router := await RouterPeer.dial(replica, SYSTEM))]
    generator = random.Random(0)
    hasher, pace = PrefixHasher(generator.getrandbits(64)), Pace()

    def request_for(beginning: list[int]) -> engine_pb2.EngineRequest:
        request = engine_pb2.EngineRequest(prompt_ids=beginning)
        request.prompt_ids.extend(generator.randrange(SHAPE.vocabulary) for _ in range(TOKENS - len(beginning)))
        request.sampling.max_tokens = 64
        return request

    first_half = [generator.randrange(SHAPE.vocabulary) for _ in range(TOKENS // 2)]
    for router in routers * 4:
        attempt = Attempt(router, Prompt(request_for(first_half), hasher), pace)
        for _ in range(2):
            pace = attempt.event(engine_pb2.EngineEvent(token_ids=[1]), pace)
        pace = attempt.end(pace)
    for kind, beginning in (("new", []), ("first half known to every router", first_half)):
        request = request_for(beginning)
        choice_s, visit_s = list[float](), list[float]()
        for _ in range(REPEATS):
            draw = generator.getrandbits(32)
            began = time.perf_counter()
            prompt = Prompt(request, hasher)
            candidates = [router.candidate(prompt, pace) for router in routers]
            router = routers[choose(candidates, pace, prompt.tokens, prompt.max_tokens, draw).index]
            choice_s.append(time.perf_counter() - began)
            attempt = Attempt(router, prompt, pace)
            visit_s.append(time.perf_counter() - began - choice_s[-1])
            attempt.end(pace)  # without an answer: this withdraws the visit
        for step, seconds in (("choosing a router", choice_s), ("noting the visit", visit_s)):
            print(
                f"{step}, {TOKENS} tokens ({kind}), {ROUTERS} routers: "
                f"{min(seconds) * 1e6:.0f} µs minimum, {statistics.median(seconds) * 1e6:.0f} µs median"
            )
    for router in routers:
        await router.close()


async def measure_requests(address: str) -> None:
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


async def main() -> None:
    """Measures the choice of a router, then whole requests."""
    async with fake_routers() as registry:
        await measure_choice(registry)
    async with fake_routers() as registry, gateway_over(registry) as address:
        await measure_requests(address)


if __name__ == "__main__":
    asyncio.run(main())
