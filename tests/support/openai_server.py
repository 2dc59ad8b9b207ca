"""A small server of OpenAI's API on loopback, for tests of HTTP clients: deterministic, with faults that a test chooses."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODELS = ("first", "second")


@dataclass(frozen=True, slots=True)
class Fault:
    """What a request gets instead of its answer: an error status, or a connection that breaks after `chunks` of a stream."""

    status: int = 0
    message: str = "refused"
    headers: dict[str, str] = field(default_factory=dict)
    chunks: int = 0
    events: tuple[str, ...] = ()  # sent as they are, in place of chunks; then the stream ends


@dataclass(slots=True)
class OpenAiTestServer:
    """What the server does, which a test may change while it runs, and what it has seen."""

    url: str = ""
    api_key: str | None = None  # that it asks for
    first_s: float = 0.0  # before a request's first token
    between_s: float = 0.0  # between two tokens
    usage: bool = True  # whether it counts tokens
    fault: Callable[[dict[str, Any], int], Fault | None] = lambda body, number: (
        None
    )  # of the request of this number, from 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)  # of the requests: seconds of the monotonic clock
    running: int = 0
    peak: int = 0  # requests at once

    async def models(self, request: Request) -> Response:
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return _error(401, "wrong key")
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})

    async def complete(self, request: Request) -> Response:
        body, number = await request.json(), len(self.bodies)
        self.bodies.append(body)
        self.arrivals.append(time.monotonic())
        if body.get("model") not in MODELS:
            return _error(404, f"no model {body.get('model')!r}")
        fault = self.fault(body, number)
        if fault is not None and fault.status:
            return _error(fault.status, fault.message, fault.headers)
        chat = request.url.path.endswith("/chat/completions")
        prompt = json.dumps(body["messages"]) if chat else str(body["prompt"])
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": body.get("max_tokens", 4)}
        if body.get("stream"):
            return StreamingResponse(self._stream(body, chat, usage, fault), media_type="text/event-stream")
        with self._counted():
            await asyncio.sleep(self.first_s + self.between_s * usage["completion_tokens"])
        text = "".join(f" {number}" for number in range(usage["completion_tokens"]))
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        answer = {"id": f"cmpl-{prompt}", "choices": [choice | {"index": 0, "finish_reason": "length"}], "usage": usage}
        return JSONResponse(answer, headers={"X-Request-Id": f"request-{number}"})

    async def _stream(
        self, body: dict[str, Any], chat: bool, usage: dict[str, int], fault: Fault | None
    ) -> AsyncIterator[str]:
        def event(text: str, finish: str | None = None) -> str:
            part = {"delta": {"content": text}} if chat else {"text": text}
            chunk = {"choices": [part | {"index": 0, "finish_reason": finish}], "usage": None}
            return f"data: {json.dumps(chunk)}\n\n"

        with self._counted():
            if fault is not None and fault.events:
                for raw in fault.events:
                    yield raw
                return
            if chat:
                role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "index": 0, "finish_reason": None}]}
                yield f"data: {json.dumps(role)}\n\n"
            yield ": waits for a slot\n\n"
            await asyncio.sleep(self.first_s)
            tokens = usage["completion_tokens"]
            for number in range(tokens):
                if fault is not None and number == fault.chunks:
                    raise ConnectionAbortedError("a test broke this stream")
                yield event(f" {number}", "length" if number == tokens - 1 else None)
                if number < tokens - 1:
                    await asyncio.sleep(self.between_s)
            if self.usage and body.get("stream_options", {}).get("include_usage"):
                yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            yield
        finally:
            self.running -= 1


@contextmanager
def openai_server(port: int = 0) -> Iterator[OpenAiTestServer]:
    """Runs a server in a thread, on a free port unless `port` names one, until the block ends."""
    state = OpenAiTestServer()
    routes = [
        Route("/v1/models", state.models),
        Route("/v1/completions", state.complete, methods=["POST"]),
        Route("/v1/chat/completions", state.complete, methods=["POST"]),
    ]
    options = {
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "log_level": "critical",
        "timeout_graceful_shutdown": 1,
    }
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), **options))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(1024)
        state.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield state
        finally:
            server.should_exit = True
            thread.join()


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "test", "code": None}}, status, headers)
