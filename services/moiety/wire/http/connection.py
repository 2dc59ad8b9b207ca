"""One HTTP connection of a client, with the limits that uvicorn does not have: on time, on bytes, on connections."""

from __future__ import annotations

import json
from asyncio import AbstractEventLoop, Transport
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take of a server. Sizes in bytes, times in seconds."""

    connections: int = 2048
    head: int = 32 << 10  # request line and headers
    request: int = 64 << 20  # a whole request; the app may accept less
    pipelined: int = 16  # requests that a client sends before it has the response to an earlier one
    request_s: float = 20.0  # in which a whole request arrives, with one second more for every `slowest` bytes
    slowest: int = 32 << 10
    idle_s: int = 75  # between requests; proxies keep a connection for 60 s as a rule, and must end it first
    closing_s: float = 5.0  # in which a client reads what is left of the last response


class Connections:
    """What the connections of one server share. Called as a class, it makes one."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.waiting: dict[Connection, None] = {}  # those whose next request is not complete, longest wait first

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
    ) -> Connection:
        return Connection(self, config, server_state, app_state, _loop)

    def make_room(self) -> bool:
        """Cuts the connection that has waited longest for a request. Returns whether there was one."""
        if (longest := next(iter(self.waiting), None)) is None:
            return False
        longest.cut()
        return True


class Connection(HttpToolsProtocol):
    """uvicorn's connection, and what ends it when its client takes too much or sends too slowly.

    A refusal has the body that OpenAI's API gives an error.
    """

    def __init__(self, shared: Connections, *arguments: Any):
        super().__init__(*arguments)
        self._shared, self._limits = shared, shared.limits
        self._in_head = True  # the next byte belongs to a request line or to headers
        self._head_bytes = self._request_bytes = 0  # of the request that arrives
        self._arriving = True  # a request is not complete; of a new connection, that has not begun either
        self._since = 0.0  # when it began to arrive
        self._closing: float | None = None  # since when
        self._plain_head = b""  # of a request that asks for another protocol: the same without that

    def cut(self) -> None:
        """Ends the connection now, whatever is still to be sent."""
        self._shared.waiting.pop(self, None)  # the transport says later that it is lost
        self.transport.abort()

    def look(self, now: float) -> None:
        """Ends the connection if its client has been too slow. Called about once a second."""
        limits = self._limits
        if self.transport.is_closing():
            if self._closing is None:
                self._closing = now
            elif now - self._closing > limits.closing_s:  # the client does not read
                self.cut()
        elif self._arriving and now - self._since > limits.request_s + self._request_bytes / limits.slowest:
            if self.flow.read_paused:  # for the app, or for the response to an earlier request
                self._since = now
            elif not self._request_bytes:
                self.transport.close()
            else:
                self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"the request was not complete after {limits.request_s:g} s")

    # What asyncio calls.

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        full = len(self.connections) >= self._limits.connections
        super().connection_made(transport)
        if full and not self._shared.make_room():
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._limits.connections} connections are open")
        else:
            self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._arriving:
            self._begin()
        self._request_bytes += len(data)
        if self._request_bytes > self._limits.request:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {self._limits.request} bytes")
        # The parser keeps an unfinished header to itself, however long it is: give it no more than is allowed.
        while data and self._in_head and not self.transport.is_closing():
            if (room := self._limits.head - self._head_bytes) <= 0:
                message = f"request line and headers may have {self._limits.head} bytes"
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)
                return
            piece, data = data[:room], data[room:]
            self._head_bytes += len(piece)
            self._parse(piece)
        if data and not self.transport.is_closing():
            self._parse(data)

    # What the parser calls.

    def on_message_begin(self) -> None:
        if not self._arriving:
            self._begin()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it is a trailer, which nobody reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._plain_head = self._without_upgrade()
            return
        self._in_head = False
        if len(self.pipeline) >= self._limits.pipelined:
            raise ValueError("too many pipelined requests")  # stops the parser
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self._plain_head:
            return
        super().on_message_complete()
        self._in_head, self._head_bytes, self._arriving = True, 0, False
        self._shared.waiting.pop(self, None)

    # What uvicorn calls.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self.pipeline:
            self._shared.waiting[self] = None

    def _begin(self) -> None:
        """Begins to count time and bytes of the next request."""
        self._arriving, self._since, self._request_bytes = True, self.loop.time(), 0
        self._shared.waiting.pop(self, None)
        self._shared.waiting[self] = None

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                # Java's client, for one, offers HTTP/2 with each request. The parser would skip the body of such a request.
                self.parser = httptools.HttpRequestParser(self)
                data, self._plain_head = self._plain_head + data[upgrade.args[0] :], b""
            except httptools.HttpParserError:
                self._refuse(HTTPStatus.BAD_REQUEST, "this is not a valid HTTP/1.1 request")
                return

    def _without_upgrade(self) -> bytes:
        """Returns the head that has been parsed, without what asks for another protocol."""
        if (method := self.parser.get_method()) == b"CONNECT":
            raise ValueError("this is no proxy")  # stops the parser
        keep = self.parser.should_keep_alive()
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % pair for pair in self.headers if pair[0] not in (b"connection", b"upgrade")]
        return b"\r\n".join([*lines, b"connection: " + (b"keep-alive" if keep else b"close"), b"\r\n"])

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answers with `status` and closes. Where the client waits for another response, it only closes."""
        cycle = self.cycle
        between = cycle is None or (cycle.response_complete and not cycle.more_body)
        if between or (cycle.more_body and not cycle.response_started and not self.pipeline):
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
