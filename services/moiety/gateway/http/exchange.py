"""One HTTP request and its response: who asks, whether the client is still there, and how the answer is written."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Receive, Scope, Send

from moiety.core.address import joined
from moiety.core.supervise import spawn
from moiety.gateway.admission import host_of
from moiety.gateway.http.errors import ClientGone, Problem
from moiety.gateway.request import new_request_id
from moiety.telemetry.tracing import parse_traceparent

_REQUEST_ID = re.compile(rb"[!-~]{1,120}")
_NO_CACHE = (b"cache-control", b"no-cache")
_UNBUFFERED = (b"x-accel-buffering", b"no")  # nginx would hold events back otherwise


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.receive, self._scope, self._send = receive, scope, send
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else new_request_id()
        trace = self.headers.get(b"traceparent", b"").decode("latin-1")
        self.traceparent = trace if parse_traceparent(trace) else None
        self.names: Mapping[str, str] = {}  # the client's names of the core's fields, for error messages
        self.started = False  # whether the status has been sent
        self.ended = False

    @property
    def host(self) -> str:
        """The client's host, named as for the gRPC API, so that admission counts both together."""
        address, port = self._scope.get("client") or ("", 0)
        return host_of(f"{'ipv6' if ':' in address else 'ipv4'}:{joined(address, port)}")

    @asynccontextmanager
    async def client_present(self) -> AsyncIterator[None]:
        """Ends the block with ClientGone as soon as the client closes its connection. The body must have been read."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as presence:

                async def watch() -> None:
                    while (await self.receive())["type"] != "http.disconnect":
                        pass
                    presence.reschedule(loop.time())

                watching = spawn("HTTP client", watch())
                try:
                    yield
                finally:
                    watching.cancel()
        except TimeoutError:
            if not presence.expired():
                raise
            self.ended = True
            raise ClientGone("the client closed its connection") from None

    async def send_json(self, content: object, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Sends the whole response."""
        await self.send_whole(json.dumps(content).encode(), b"application/json", status, headers)

    async def send_whole(
        self, body: bytes, kind: bytes, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """Sends the whole response, of media type `kind`."""
        await self._start(status, [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers])
        await self._write(body, last=True)

    async def send_problem(self, problem: Problem) -> None:
        """Sends an error as the whole response."""
        await self.send_json(problem.body(), problem.status, problem.headers())

    async def send_events(self, events: bytes, *, last: bool = False) -> None:
        """Sends server-sent events; the first call also sends the status 200."""
        if not self.started:
            await self._start(200, [(b"content-type", b"text/event-stream; charset=utf-8"), _NO_CACHE, _UNBUFFERED])
        await self._write(events, last=last)

    def break_off(self) -> None:
        """Leaves the response incomplete. The server then closes the connection."""
        self.ended = True

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        ours = (b"x-request-id", self.request_id.encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, ours]})

    async def _write(self, body: bytes, *, last: bool) -> None:
        self.ended = last
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})


def event(content: Any) -> bytes:
    """Returns a server-sent event that carries JSON."""
    # ASCII only: some clients also break lines at U+2028 and U+0085, which JSON otherwise leaves as they are.
    return b"data: %s\n\n" % json.dumps(content, separators=(",", ":")).encode()
