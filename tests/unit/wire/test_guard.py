"""What every server does for every RPC: no stream without a request stays open, and no error quotes what is internal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moiety.errors import NotFound
from moiety.testing import HOST, eventually
from moiety.wire.channels import channel
from moiety.wire.server import Server

SERVICE = "test.Service"


class Handlers:
    """Methods that answer, fail in several ways, or wait."""

    def __init__(self) -> None:
        self.waiting = 0
        self.handler = grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Echo": self._method(self._echo),
                "Fail": self._method(self._fail),
                "Miss": self._method(self._miss),
                "Wait": self._method(self._wait),
                "Stream": grpc.unary_stream_rpc_method_handler(self._stream),
            },
        )

    def _method(self, behaviour: object) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            behaviour, empty_pb2.Empty.FromString, empty_pb2.Empty.SerializeToString
        )

    async def _echo(self, request: empty_pb2.Empty, _: grpc.aio.ServicerContext) -> empty_pb2.Empty:
        return request

    async def _fail(self, _request: empty_pb2.Empty, _: grpc.aio.ServicerContext) -> empty_pb2.Empty:
        raise KeyError("secret")

    async def _miss(self, _request: empty_pb2.Empty, _: grpc.aio.ServicerContext) -> empty_pb2.Empty:
        raise NotFound("no such thing")

    async def _wait(self, request: empty_pb2.Empty, _: grpc.aio.ServicerContext) -> empty_pb2.Empty:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        return request

    async def _stream(self, request: bytes, _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        yield request
        raise KeyError("secret")


@asynccontextmanager
async def serving(streams: int = 1000) -> AsyncIterator[tuple[grpc.aio.Channel, Handlers]]:
    """A server with the handlers, for at most 20 s, and a connection to it."""
    handlers = Handlers()
    server = Server([handlers.handler], [SERVICE], streams=streams)
    address = f"{HOST}:{await server.start(HOST, 0)}"
    try:
        async with asyncio.timeout(20), channel(address) as link:
            yield link, handlers
    finally:
        await server.stop(0)


def half_open(link: grpc.aio.Channel, method: str = "Echo") -> grpc.aio.StreamStreamCall:
    """Opens an RPC whose request never follows."""
    call = link.stream_stream(f"/{SERVICE}/{method}")()
    return call


async def status_of(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    """Waits for the end of a call; returns its code and text."""
    if isinstance(call, grpc.aio.UnaryStreamCall):
        with suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
    return await call.code(), await call.details()


async def test_an_rpc_without_a_request_ends(monkeypatch: pytest.MonkeyPatch):
    """An RPC whose request does not come in time gets DEADLINE_EXCEEDED; one with a request is not limited."""
    monkeypatch.setattr("moiety.wire.guard.REQUEST_S", 0.2)
    async with serving() as (link, handlers):
        waits = link.unary_unary(f"/{SERVICE}/Wait")(b"")
        calls = [half_open(link) for _ in range(20)]
        for call in calls:
            code, text = await status_of(call)
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "no request has followed the headers for 0.2 s" in text
        assert handlers.waiting == 1
        assert not waits.done()
        waits.cancel()


async def test_rpcs_without_a_request_are_few(monkeypatch: pytest.MonkeyPatch):
    """Beyond MOST_EMPTY such RPCs the oldest end at once, while requests are served."""
    monkeypatch.setattr("moiety.wire.guard.MOST_EMPTY", 10)
    async with serving() as (link, _):
        calls = [half_open(link) for _ in range(100)]
        await eventually(lambda: sum(call.done() for call in calls) == 90)
        assert await link.unary_unary(f"/{SERVICE}/Echo")(b"") == b""
        assert sum(call.done() for call in calls) in {90, 91}
        for call in calls:
            call.cancel()


async def test_an_unexpected_error_is_internal_without_its_text(caplog: pytest.LogCaptureFixture):
    """The client gets an id, under which the log has the error once, from single responses and from streams."""
    async with serving() as (link, _):
        for call in (link.unary_unary(f"/{SERVICE}/Fail"), link.unary_stream(f"/{SERVICE}/Stream")):
            caplog.clear()
            code, text = await status_of(call(b""))
            assert code is grpc.StatusCode.INTERNAL
            assert "secret" not in text
            (logged,) = [record for record in caplog.records if record.name.startswith("moiety")]
            assert text.rpartition(" ")[2] in logged.message
            assert "secret" in caplog.text
        assert await link.unary_unary(f"/{SERVICE}/Echo")(b"") == b""


async def test_errors_of_ours_and_bad_requests_have_their_codes():
    """An error of errors.py keeps its code and text; unreadable bytes are INVALID_ARGUMENT, an unknown method is named."""
    async with serving() as (link, _):
        found = {
            method: await status_of(link.unary_unary(f"/{SERVICE}/{method}")(data))
            for method, data in (("Miss", b""), ("Echo", b"\x0a\x01"), ("Nothing", b""))
        }
        assert found["Miss"] == (grpc.StatusCode.NOT_FOUND, "no such thing")
        assert found["Echo"][0] is grpc.StatusCode.INVALID_ARGUMENT
        assert found["Nothing"][0] is grpc.StatusCode.UNIMPLEMENTED


async def test_open_health_streams_are_few(monkeypatch: pytest.MonkeyPatch):
    """Watches of the health service, which stay open, are refused beyond MOST_SIDE; single checks are answered all the same.

    Whoever holds many watches must not make the probes of the cluster fail: they would take the service out of use.
    """
    monkeypatch.setattr("moiety.wire.guard.MOST_SIDE", 3)
    async with serving() as (link, _):
        health, request = health_pb2_grpc.HealthStub(link), health_pb2.HealthCheckRequest()
        watches = [health.Watch(request) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        code, text = await status_of(health.Watch(request))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 streams of health and reflection are open, the most allowed" in text
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        watches[0].cancel()
        while await (again := health.Watch(request)).read() is grpc.aio.EOF:
            assert await again.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await asyncio.sleep(0.01)


async def test_headers_are_bounded():
    """An RPC with 64 KB of headers is refused, and the next one is served."""
    async with serving() as (link, _):
        echo = link.unary_unary(f"/{SERVICE}/Echo")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await echo(b"", metadata=(("large", "x" * (64 << 10)),))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await echo(b"") == b""


async def test_the_streams_of_a_connection_are_bounded():
    """A connection has at most `streams` RPCs at the server; the client's library keeps others back until one ends."""
    async with serving(streams=4) as (link, handlers):
        calls = [link.unary_unary(f"/{SERVICE}/Wait")(b"") for _ in range(8)]
        await eventually(lambda: handlers.waiting == 4)
        for call in calls[:4]:
            call.cancel()
        await eventually(lambda: handlers.waiting == 4 and not any(call.done() for call in calls[4:]))
        for call in calls:
            call.cancel()
