"""The ASGI application of the HTTP API: which request goes where, and how errors are answered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from moiety.core.visible import visible
from moiety.gateway.core import GenerationCore
from moiety.gateway.http.body import BodyReader
from moiety.gateway.http.chat import Chat
from moiety.gateway.http.completions import Completions
from moiety.gateway.http.errors import ClientGone, HttpError, problem_of
from moiety.gateway.http.exchange import Exchange
from moiety.gateway.http.status import Status
from moiety.gateway.http.texts import Detokenize, Tokenize
from moiety.gateway.http.tools import ChatFormat
from moiety.gateway.unread import Readers

Get = Callable[[Exchange], Awaitable[None]]
Post = Callable[[Exchange, Mapping[str, Any]], Awaitable[None]]
_MODEL = "/v1/models/"


def build_app(core: GenerationCore, *, formats: str = "auto") -> ASGIApp:
    """Returns the application that serves `core` over HTTP. It must run in the event loop of `core`.

    `formats`: how the model writes reasoning and tool calls: auto (by the checkpoint's chat template), none, or a name in
    gateway/formats; raises ConfigError for another one.
    """
    return _App(core, formats)


class _App:
    def __init__(self, core: GenerationCore, formats: str):
        readers, status = Readers(), Status(core)
        served = core.model
        template = served.template.text if served.template is not None else None
        self._bodies = BodyReader()
        self._posts: dict[str, Post] = {
            "/v1/completions": Completions(core, readers),
            "/v1/chat/completions": Chat(core, readers, ChatFormat(served.tokenizer, template, formats)),
            "/tokenize": Tokenize(core),
            "/detokenize": Detokenize(core),
        }
        self._gets: dict[str, Get] = {
            "/v1/models": status.models,
            "/healthz": status.health,
            "/health": status.health,  # vLLM's name
            "/readyz": status.ready,
            "/version": status.version,
            "/openapi.json": status.openapi,
            "/docs": status.docs,
        }
        self._model = status.model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            raise RuntimeError(f"ASGI scope {scope['type']!r} is not served")  # as ASGI asks for lifespan
        exchange = Exchange(scope, receive, send)
        try:
            await self._answer(exchange, scope["method"], scope["path"])
        except ClientGone:
            exchange.ended = True
        except Exception as error:
            problem = problem_of(visible(error, exchange.request_id), exchange.names)
            if exchange.started:
                exchange.break_off()
            else:
                await exchange.send_problem(problem)

    async def _answer(self, exchange: Exchange, method: str, path: str) -> None:
        if (post := self._posts.get(path)) is not None:
            _check_method(method, "POST")
            content = await self._bodies.read(exchange.headers, exchange.receive)
            async with exchange.client_present():
                await post(exchange, content)
        elif (get := self._gets.get(path)) is not None:
            _check_method(method, "GET", "HEAD")
            await get(exchange)
        elif path.startswith(_MODEL):
            _check_method(method, "GET", "HEAD")
            await self._model(exchange, path.removeprefix(_MODEL))
        else:
            raise HttpError(404, f"no such path: {method} {path[:200]}", "unknown_url")


def _check_method(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise HttpError(
            405, f"method {method[:20]} is not allowed here; use {allowed[0]}", "method_not_allowed", allowed
        )
