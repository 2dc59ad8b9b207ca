"""The HTTP server: how it stops, and what it refuses to clients that take too much or send too slowly."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from moiety.errors import ConfigError
from moiety.testing import HOST, eventually
from moiety.wire.http.connection import Limits
from moiety.wire.http.server import HttpServer

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


@dataclass
class App:
    """Answers with method and size of the body; on the path /wait not before `go`, with a first byte at once."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    left: int = 0  # requests whose clients went away

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serves one request."""
        self.running += 1
        try:
            size, more = 0, True
            while more:
                event = await receive()
                if event["type"] == "http.disconnect":
                    self.left += 1
                    return
                size, more = size + len(event["body"]), event["more_body"]
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if scope["path"] == "/wait":
                await send({"type": "http.response.body", "body": b".", "more_body": True})
                gone = asyncio.create_task(receive())
                go = asyncio.create_task(self.go.wait())
                await asyncio.wait([gone, go], return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    self.left += 1
                gone.cancel()
                go.cancel()
            await send({"type": "http.response.body", "body": f"{scope['method']} {size}".encode()})
        finally:
            self.running -= 1


class Peer:
    """A client's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Sends bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def response(self) -> tuple[int, bytes]:
        """Reads one response: status and body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        status = int(head.split(b" ")[1])
        if b"content-length" in fields:
            return status, await self.reader.readexactly(int(fields[b"content-length"]))
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()
        return status, body

    async def closed(self) -> bool:
        """Waits until the server has closed the connection; returns whether it said nothing more."""
        try:
            return not await self.reader.read()
        except ConnectionError:
            return True


@asynccontextmanager
async def serving(app: Any, limits: Limits | None = None) -> AsyncIterator[tuple[HttpServer, int]]:
    """A running server and its port, for at most 20 s."""
    server = HttpServer(app, limits)
    async with asyncio.timeout(20):
        port = await server.start(HOST, 0)
        try:
            yield server, port
        finally:
            await server.stop(0)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Peer]:
    """A connection to the server."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield Peer(reader, writer)
    finally:
        writer.close()


async def answer(port: int, *parts: bytes) -> tuple[int, bytes]:
    """Sends `parts` on a new connection; returns the first response."""
    async with connected(port) as peer:
        for part in parts:
            await peer.send(part)
        return await peer.response()


def message(body: bytes) -> str:
    """Returns the message of a refusal, which has the shape of an error of OpenAI's API."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


# The end of a server --------------------------------------------------------------------------------------------


async def test_requests_finish_within_the_grace_and_no_new_one_begins():
    """A server that stops refuses connections and closes idle ones at once, and lets a running request finish."""
    app = App()
    async with serving(app) as (server, port), connected(port) as busy, connected(port) as idle:
        await idle.send(GET)
        assert await idle.response() == (200, b"GET 0")
        await busy.send(GET.replace(b"/ ", b"/wait "))
        await eventually(lambda: app.running == 1)
        stopping = asyncio.create_task(server.stop(10))
        assert await idle.closed()
        with pytest.raises(ConnectionError):
            await asyncio.open_connection(HOST, port)
        assert not stopping.done()
        app.go.set()
        assert await busy.response() == (200, b".GET 0")
        assert await busy.closed()
        await stopping
    assert (app.running, app.left) == (0, 0)


async def test_requests_that_outlast_the_grace_are_cut():
    """After the grace period a running request sees that its client is gone, and nothing of it is left."""
    app, before = App(), asyncio.all_tasks()
    async with serving(app) as (server, port), connected(port) as peer:
        await peer.send(GET.replace(b"/ ", b"/wait "))
        await eventually(lambda: app.running == 1)
        await server.stop(0.1)
        assert (app.running, app.left) == (0, 1)
        await peer.closed()
    await eventually(lambda: asyncio.all_tasks() == before)


async def test_a_request_that_does_not_end_is_cancelled():
    """An app that ignores its lost client does not keep the server from stopping."""
    ended = asyncio.Event()

    async def stubborn(_scope: object, _receive: object, _send: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serving(stubborn) as (server, port), connected(port) as peer:
        await peer.send(GET)
        await eventually(lambda: not server.idle)
        await server.stop(0)
        assert ended.is_set()


async def test_a_server_that_never_started_stops():
    """Stopping twice, or before the start, does nothing."""
    server = HttpServer(App())
    await server.stop(1)
    await server.stop(0)


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [b"", b"\r\n", b"GET / HT", b"GET / HTTP/1.1\r\nHost: h\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf"],
    ids=["nothing", "an empty line", "half a line", "half a head", "half a body"],
)
async def test_a_request_that_trickles_in_is_cut(sent: bytes):
    """A connection whose request is not complete in time is closed, with a 408 if it has said anything."""
    app = App()
    async with serving(app, Limits(request_s=0.2)) as (_, port), connected(port) as peer:
        if sent:
            await peer.send(sent)
            status, body = await peer.response()
            assert (status, message(body)) == (408, "the request was not complete after 0.2 s")
        assert await peer.closed()
        await eventually(lambda: app.running == 0)


async def test_bytes_that_come_one_by_one_do_not_extend_the_time():
    """A client that sends a byte now and then gets no more time than one that sends none."""
    async with serving(App(), Limits(request_s=0.3)) as (_, port), connected(port) as peer:
        reading = asyncio.create_task(peer.response())
        for byte in GET[:-1]:
            if reading.done():
                break
            peer.writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
        assert (await reading)[0] == 408


async def test_the_time_is_that_of_the_request_alone():
    """Neither a slow response nor a pause between requests counts; an idle connection is closed after its own time."""
    app = App()
    async with serving(app, Limits(request_s=0.2, idle_s=2)) as (_, port), connected(port) as peer:
        await peer.send(GET.replace(b"/ ", b"/wait "))
        await asyncio.sleep(1.0)
        app.go.set()
        assert await peer.response() == (200, b".GET 0")
        await asyncio.sleep(1.0)
        await peer.send(GET)
        assert await peer.response() == (200, b"GET 0")
        assert await peer.closed()


async def test_a_large_body_gets_time_for_its_size():
    """A client that sends steadily may take longer than the time for a small request."""
    head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n"
    async with serving(App(), Limits(request_s=0.3, slowest=10_000)) as (_, port), connected(port) as peer:
        await peer.send(head)
        for _ in range(10):
            await peer.send(bytes(10_000))
            await asyncio.sleep(0.15)
        assert await peer.response() == (200, b"POST 100000")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"u" * 40_000, 431),
        (b"GET / HTTP/1.1\r\nA: " + b"v" * 40_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 7_000, 431),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT other:1 HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ],
    ids=["address", "header", "headers", "TLS", "HTTP/2", "proxy", "length", "two lengths"],
)
async def test_heads_that_are_refused(head: bytes, status: int):
    """A head that is too long or not HTTP/1.1 gets an error in OpenAI's shape, and the connection is closed."""
    async with serving(App()) as (_, port), connected(port) as peer:
        await peer.send(head)
        got, body = await peer.response()
        assert got == status
        assert "HTTP/1.1" in message(body) if status == 400 else "32768 bytes" in message(body)
        await peer.closed()
        assert await answer(port, GET) == (200, b"GET 0")


@pytest.mark.parametrize(
    ("first", "then"),
    [(b"", b"1000\r\n" + bytes(0x1000) + b"\r\n"), (b"0\r\n", b"a: b\r\n" * 1000), (b"0\r\na: ", b"b" * 0x1000)],
    ids=["chunks", "trailers", "one trailer"],
)
async def test_a_request_without_end_is_cut(first: bytes, then: bytes):
    """The server bounds a whole request, whatever the app accepts."""
    async with serving(App(), Limits(request=100_000)) as (_, port), connected(port) as peer:
        reading = asyncio.create_task(peer.reader.read())
        await peer.send(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + first)
        with suppress(ConnectionError):
            while True:  # until the connection is cut
                await peer.send(then)
                await asyncio.sleep(0.001)
        (said,) = await asyncio.gather(reading, return_exceptions=True)
        assert isinstance(said, ConnectionError) or said.startswith(b"HTTP/1.1 413 ")
        assert await answer(port, GET) == (200, b"GET 0")


async def test_a_flood_of_pipelined_requests_is_cut():
    """A few requests may follow each other without waiting; a connection with thousands is closed."""
    async with serving(App()) as (_, port):
        async with connected(port) as peer:
            await peer.send(8 * GET)
            assert [await peer.response() for _ in range(8)] == 8 * [(200, b"GET 0")]
        async with connected(port) as peer:
            await peer.send(10_000 * GET)
            await peer.closed()
        assert await answer(port, GET) == (200, b"GET 0")


async def test_an_offer_of_another_protocol_is_ignored():
    """A request that offers HTTP/2 or asks for a WebSocket is served over HTTP/1.1, with its body; the next one too."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    for protocol in (b"h2c", b"websocket"):
        head = b"POST / HTTP/1.1\r\nHost: h\r\n" + offer % protocol
        for body in (b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"):
            for parts in ([head + body], [head, body], [bytes([byte]) for byte in head + body]):
                async with serving(App()) as (_, port), connected(port) as peer:
                    for part in parts:
                        await peer.send(part)
                    assert await peer.response() == (200, b"POST 5")
                    await peer.send(GET)
                    assert await peer.response() == (200, b"GET 0")


# How many connections -------------------------------------------------------------------------------------------


async def test_connections_that_wait_make_room():
    """Where all connections are taken, a new client takes the place of the one that has said nothing for longest."""
    async with serving(App(), Limits(connections=3)) as (server, port):
        silent = [await asyncio.open_connection(HOST, port) for _ in range(3)]
        await eventually(lambda: server.connections == 3)
        assert await answer(port, GET) == (200, b"GET 0")
        assert not await silent[0][0].read()
        assert server.connections <= 3
        for _, writer in silent:
            writer.close()


async def test_running_requests_keep_their_connections():
    """Where every connection has a running request, a new client gets 503; afterwards it is served."""
    app = App()
    async with serving(app, Limits(connections=2)) as (server, port):
        async with connected(port) as one, connected(port) as two:
            for peer in (one, two):
                await peer.send(GET.replace(b"/ ", b"/wait "))
            await eventually(lambda: app.running == 2)
            status, body = await answer(port)
            assert (status, message(body)) == (503, "2 connections are open")
            app.go.set()
            assert [await peer.response() for peer in (one, two)] == 2 * [(200, b".GET 0")]
        await eventually(lambda: server.connections == 0)
        assert await answer(port, GET) == (200, b"GET 0")


async def test_clients_leave_descriptors_for_others():
    """However many connections are allowed, they take at most half of the file descriptors of the process."""
    import resource

    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert HttpServer(App(), Limits(connections=1 << 30)).limits.connections == descriptors // 2
    assert HttpServer(App(), Limits(connections=7)).limits.connections == 7


async def test_a_client_that_does_not_read_its_refusal_is_cut():
    """A connection whose last bytes are not read does not stay."""
    gone = asyncio.Event()

    async def large(_scope: object, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        try:
            async with asyncio.timeout(0.2):
                while True:
                    await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        except TimeoutError:
            gone.set()  # the app gives up; the server closes, with megabytes in its buffer

    async with serving(large, Limits(closing_s=0.3)) as (server, port), connected(port) as peer:
        await peer.send(GET)
        await gone.wait()
        await eventually(lambda: server.connections == 0)


# The address ----------------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_named():
    """A port that another program has is refused with the name of the setting."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"gateway.http_port = {port}: cannot listen on {HOST}: "):
            await HttpServer(App()).start(HOST, port)
        with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid: "):
            await HttpServer(App()).start("no.such.host.invalid", 0)


async def test_a_port_can_be_shared():
    """Two servers that share a port both listen; when one stops, the other serves on."""
    one, two = (HttpServer(App(), share_port=True) for _ in range(2))
    port = await one.start(HOST, 0)
    assert await two.start(HOST, port) == port
    await one.stop(0)
    for _ in range(5):
        assert await answer(port, LAST_GET) == (200, b"GET 0")
    await two.stop(0)
