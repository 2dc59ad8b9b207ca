"""Serves an ASGI application on a free port of this machine, in the event loop of the test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.types import ASGIApp

from moiety.core.supervise import spawn
from moiety.testing import HOST, eventually


class _Server(uvicorn.Server):
    """A server that leaves the process's signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def http_door(app: ASGIApp) -> AsyncIterator[str]:
    """The address of `app` while the block runs, such as http://127.0.0.1:40000."""
    with socket.create_server((HOST, 0)) as listening:
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        server = _Server(config)
        serving = spawn("HTTP door", server.serve([listening]))
        try:
            await eventually(lambda: server.started)
            yield f"http://{HOST}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await asyncio.wait([serving])
