"""A real gateway with both doors over fake engines: gRPC, and HTTP by a real server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from moiety.gateway.http.app import build_app
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.testing import FakeEngine
from support.gateways import Gateway, gateway_over
from support.http_door import http_door

ChatDoor = Callable[..., AbstractAsyncContextManager["Door"]]  # from engines and options to a gateway of a chat model


@dataclass(slots=True)
class Door:
    """A gateway, and a client of its HTTP door."""

    gateway: Gateway
    url: str
    http: httpx.AsyncClient

    async def post(self, path: str, **body: object) -> Any:
        """Posts JSON; returns the answer's JSON, which must have status 200."""
        answer = await self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, path: str, status: int, **body: object) -> dict[str, Any]:
        """Posts JSON that must be refused with `status`; returns the error."""
        answer = await self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    async def events(self, path: str, **body: object) -> list[Any]:
        """Posts JSON with `stream`; returns the JSON of all events but [DONE], which must be the last."""
        async with self.http.stream("POST", path, json={"stream": True, **body}) as answer:
            assert answer.status_code == 200, await answer.aread()
            assert answer.headers["content-type"].startswith("text/event-stream")
            text = (await answer.aread()).decode()
        events = [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]


@asynccontextmanager
async def door_over(
    tokenizer: Tokenizer, *engines: FakeEngine, formats: str = "auto", **options: Any
) -> AsyncIterator[Door]:
    """A running gateway over `engines` with both doors. `options` are those of `gateway_over`."""
    async with gateway_over(tokenizer, *engines, **options) as gateway:
        app = build_app(gateway.core, formats=formats)
        async with http_door(app) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
            yield Door(gateway, url, client)
