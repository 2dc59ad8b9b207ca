"""A server of the public API on loopback that says what a test wants."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from moiety.client import Client, SyncClient
from moiety.errors import ResourceExhausted
from moiety.testing import HOST
from moiety.tools.chaos.relay import Relay
from moiety.v1 import generation_pb2, generation_pb2_grpc
from moiety.wire import status
from moiety.wire.server import Door, Server, public_door
from moiety.wire.service_names import GENERATION_SERVICE

DOOR = public_door(max_age_s=600.0, max_age_grace_s=None)
PROMPT = [5, 6, 7]


class Generations(generation_pb2_grpc.GenerationServiceServicer):
    """Answers each request with `max_tokens` tokens, 0, 1, …, one a message."""

    def __init__(self) -> None:
        self.silent_s = 0.0  # before the first token
        self.held_at: int | None = None  # the token before which a request without a tenant waits for `go`
        self.go = asyncio.Event()
        self.refusals = 0  # that are left
        self.asked = 0  # requests so far
        self.running = 0
        self.peers: Counter[str] = Counter()  # requests by connection

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        self.asked += 1
        if self.refusals:
            self.refusals -= 1
            await status.abort(context, ResourceExhausted("the queue is full", 0.2))
        self.peers[context.peer()] += 1
        self.running += 1
        try:
            await asyncio.sleep(self.silent_s)
            for token in range(request.sampling.max_tokens):
                if token == self.held_at and not request.tenant:
                    await self.go.wait()
                yield generation_pb2.GenerateResponse(token_ids=[token], text=f"{token} ", logprobs=[-0.5])
        finally:
            self.running -= 1

    async def ListModels(
        self, _request: generation_pb2.ListModelsRequest, _context: grpc.aio.ServicerContext
    ) -> generation_pb2.ListModelsResponse:
        model = generation_pb2.Model(name="fake", revision="r", max_context=64)
        return generation_pb2.ListModelsResponse(models=[model])


@asynccontextmanager
async def serving(generations: Generations, door: Door = DOOR) -> AsyncIterator[str]:
    """Serves `generations` behind the gateway's options; yields the address."""
    server = Server([], [GENERATION_SERVICE], door=door)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(generations, server.grpc)
    port = await server.start(HOST, 0)
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def default_server(generations: Generations, *options: tuple[str, int]) -> AsyncIterator[str]:
    """Serves `generations` behind gRPC's default settings, except for `options`; yields the address."""
    server = grpc.aio.server(options=options)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(generations, server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield f"{HOST}:{port}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def relayed(address: str, round_trip_s: float = 0.0) -> AsyncIterator[tuple[Relay, str]]:
    """A relay in front of `address`, which delays each way by half of `round_trip_s`; yields it and its address."""
    relay = Relay(int(address.rpartition(":")[2]))
    relay.delay_s = round_trip_s / 2
    await relay.start(0)
    try:
        yield relay, f"{relay.host}:{relay.port}"
    finally:
        await relay.close()


async def tokens(client: Client, max_tokens: int, **options: object) -> list[int]:
    """Sends one request; returns all its tokens."""
    stream = client.generate(PROMPT, max_tokens=max_tokens, **options)  # type: ignore[arg-type]
    return [token async for chunk in stream for token in chunk.token_ids]


def sync_tokens(client: SyncClient, max_tokens: int, **options: object) -> list[int]:
    """Sends one request; returns all its tokens."""
    stream = client.generate(PROMPT, max_tokens=max_tokens, **options)  # type: ignore[arg-type]
    return [token for chunk in stream for token in chunk.token_ids]
