"""A router that serves one event stream over loopback, and the gateway's end of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import grpc

from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.testing import HOST
from moiety.v1 import generation_pb2
from moiety.wire.channels import channel
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_client import CallClient
from moiety.wire.event_stream.call_server import CallHandler, CallServer, SendEvent
from moiety.wire.server import Server
from moiety.wire.service_names import ENGINE_SERVICE


class Router(engine_pb2_grpc.EngineServiceServicer):
    """Answers each call with `handle`; stopping `server` loses it."""

    def __init__(self, handle: CallHandler):
        self._handle = handle
        self.streams: list[CallServer] = []
        self.seen: list[engine_pb2.GenerateTokensRequest] = []
        self.server = Server([], [ENGINE_SERVICE])
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self, self.server.grpc)

    async def GenerateTokens(
        self, calls: AsyncIterator[engine_pb2.GenerateTokensRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        self.streams.append(CallServer(self._answer))
        await self.streams[-1].serve(calls, context)

    async def _answer(self, call: engine_pb2.GenerateTokensRequest, send_event: SendEvent) -> None:
        self.seen.append(call)
        await self._handle(call, send_event)


@asynccontextmanager
async def serving(handle: CallHandler) -> AsyncIterator[tuple[Router, str]]:
    """A router that listens, for at most 20 s, and its address."""
    router = Router(handle)
    address = f"{HOST}:{await router.server.start(HOST, 0)}"
    try:
        async with asyncio.timeout(20):
            yield router, address
    finally:
        await router.server.stop(0)


@asynccontextmanager
async def calling(handle: CallHandler) -> AsyncIterator[tuple[Router, CallClient]]:
    """A router, and a gateway's end of one stream to it."""
    async with serving(handle) as (router, address), channel(address) as link:
        client = CallClient(engine_pb2_grpc.EngineServiceStub(link), "the router")
        yield router, client
        await client.close()


def event(token: int, *, last: bool = False) -> engine_pb2.EngineEvent:
    """Returns an event of one token; `last` ends its choice."""
    reason = generation_pb2.FINISH_REASON_LENGTH if last else generation_pb2.FINISH_REASON_UNSPECIFIED
    return engine_pb2.EngineEvent(token_ids=[token], finish_reason=reason)


def request(name: str, choices: int = 1) -> engine_pb2.EngineRequest:
    """Returns a request that a test recognises by its name."""
    return engine_pb2.EngineRequest(request_id=name, sampling=generation_pb2.SamplingParams(n=choices))


async def tokens(client: CallClient, name: str = "a", *, left_s: float = inf, choices: int = 1) -> list[int]:
    """Sends one request; returns all its tokens."""
    deadline = Deadline() if left_s == inf else Deadline.after(left_s)
    found: list[int] = []
    async for got in client.generate(request(name, choices), deadline, ""):
        found += got.token_ids
    return found
