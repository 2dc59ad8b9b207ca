"""A client that does not read takes no router's place, loses its request with a reason, and disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from gateway_support import PROMPT, Gateway, expected, gateway_over, tokens

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine, eventually, fake_shape
from moiety.v1 import generation_pb2, generation_pb2_grpc

SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16), ("grpc.use_local_subchannel_pool", 1)]
LONG = 10_000  # tokens: 0.5 MB of responses, of which a connection takes 64 KB unread


@asynccontextmanager
async def unread(gateway: Gateway, requests: int) -> AsyncIterator[list[grpc.aio.UnaryStreamCall]]:
    """Sends long requests whose responses nobody reads."""
    async with grpc.aio.insecure_channel(gateway.address, options=SMALL_WINDOW) as link:
        stub = generation_pb2_grpc.GenerationServiceStub(link)
        sampling = generation_pb2.SamplingParams(max_tokens=LONG, seed=0)
        ids = generation_pb2.TokenIds(ids=PROMPT)
        calls = [
            stub.Generate(generation_pb2.GenerateRequest(token_ids=ids, sampling=sampling)) for _ in range(requests)
        ]
        try:
            yield calls
        finally:
            for call in calls:
                call.cancel()


async def received(call: grpc.aio.UnaryStreamCall, pauses: tuple[int, ...] = ()) -> int:
    """Reads to the end, with a pause of 0.3 s at each of these numbers of tokens; returns how many tokens came."""
    got = 0
    while (response := await call.read()) is not grpc.aio.EOF:
        got += len(response.token_ids)
        if got in pauses:
            await asyncio.sleep(0.3)
    return got


def engine() -> FakeEngine:
    """A router with one slot and a queue of two."""
    return FakeEngine("r0", fake_shape(max_context=2 * LONG), slots=1, queue=2)


async def test_unread_responses_take_no_place_at_a_router(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Requests that the router has ended fill neither its slots nor its queue, though their clients have read nothing."""
    monkeypatch.setattr("moiety.wire.event_stream.call_client.MOST_UNREAD", LONG)
    router = engine()
    async with gateway_over(tokenizer, router) as gateway, unread(gateway, 3):  # as many as the router has places
        await eventually(lambda: len(router.requests) == 3)
        assert await tokens(gateway, retries=5) == expected(6)
        assert gateway.core.running == 3


async def test_a_client_that_does_not_read_is_cut_off(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """After UNREAD_S its request ends, also at the router, and the client finds the reason behind what it had not read."""
    monkeypatch.setattr("moiety.gateway.unread.UNREAD_S", 0.3)
    async with gateway_over(tokenizer, engine()) as gateway, unread(gateway, 2) as calls:
        await eventually(lambda: gateway.core.begun == 2)
        await eventually(lambda: gateway.core.running == 0)
        assert await tokens(gateway) == expected(6)
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match=r"the client has not read for 0.3 s") as cut:
                await received(call)
            assert cut.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_reads_slowly_gets_everything(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """A client that pauses for less than UNREAD_S loses nothing."""
    monkeypatch.setattr("moiety.gateway.unread.UNREAD_S", 2.0)
    monkeypatch.setattr("moiety.wire.event_stream.call_client.MOST_UNREAD", LONG)
    async with gateway_over(tokenizer, engine()) as gateway, unread(gateway, 1) as calls:
        assert await received(calls[0], pauses=(10, LONG // 2)) == LONG


async def test_a_client_that_reads_late_resumes_after_its_router_is_gone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    """A request that notices the loss of its router after all others have left that router still resumes on another one."""
    monkeypatch.setattr("moiety.wire.event_stream.call_client.MOST_UNREAD", LONG)
    lost, other = engine(), FakeEngine("r1", fake_shape(max_context=2 * LONG))
    sent = asyncio.Event()

    async def hold(position: int) -> None:
        if position == LONG // 2:  # more than the client's connection takes unread
            sent.set()
            await asyncio.Event().wait()

    async with gateway_over(tokenizer, lost) as gateway, unread(gateway, 1) as calls:
        lost.before_token = hold
        await sent.wait()
        await other.start(gateway.registry)
        await lost.vanish()
        try:
            for _ in range(4):
                assert await tokens(gateway) == expected(6)  # which drops the router that is lost
            assert await received(calls[0]) == LONG
        finally:
            await other.vanish()
