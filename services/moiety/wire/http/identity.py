"""How a gateway says over HTTP which system it is of, and how another one asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

PATH = "/moiety/system"
MOST_BYTES = 16 << 10
App = Callable[..., Awaitable[None]]  # as ASGI 3.0 defines it


@dataclass(frozen=True, slots=True)
class Owner:
    """Who listens at a port: the name of the model, for people, and the system, as text."""

    model: str
    system: str


def identified(app: App, owner: Owner) -> App:
    """Returns `app` with a page at PATH that says who serves it."""
    body = json.dumps({"model": owner.model, "system": owner.system}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]

    async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] != PATH:
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return answer


async def ask(address: str, port: int, timeout_s: float) -> Owner | None:
    """Asks who listens at `address`:`port`; None if that is no gateway, or does not answer within `timeout_s`."""
    answer = b""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                while len(answer) < MOST_BYTES and (piece := await reader.read(MOST_BYTES)):
                    answer += piece
            finally:
                writer.close()
        said = json.loads(answer.partition(b"\r\n\r\n")[2])
        return Owner(str(said["model"]), str(said["system"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a TimeoutError is an OSError
        return None
