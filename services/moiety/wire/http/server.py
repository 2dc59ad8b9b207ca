"""Runs an ASGI app over HTTP/1.1 in the service's own event loop, on uvicorn."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from dataclasses import replace
from math import inf

import uvicorn

from moiety.core.supervise import spawn, supervise
from moiety.errors import ConfigError
from moiety.wire.http.connection import Connections, Limits
from moiety.wire.http.identity import App

LOOK_S = 0.5  # how often connections are looked at
WATCH_S = 0.02  # how often a server that stops looks whether requests have ended
CUT_S = 1.0  # in which a request whose connection is cut ends by itself
# Of TCP, to find a client that has gone without a word while its request runs. In seconds, the last in milliseconds.
_PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}


class HttpServer:
    """Serves `app`. It sees to the limits of connections and to the end of requests; the app does the rest."""

    def __init__(self, app: App, limits: Limits | None = None, *, share_port: bool = False):
        """`share_port`: other processes may listen on the same port. The app gets no lifespan events."""
        limits = limits or Limits()
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors != resource.RLIM_INFINITY:  # clients must leave some for routers and Redis
            limits = replace(limits, connections=max(1, min(limits.connections, descriptors // 2)))
        self.limits, self._share_port = limits, share_port
        self._connections = Connections(limits)
        config = uvicorn.Config(
            app,
            http=self._connections,  # type: ignore[arg-type]  # a callable serves as the class does
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,  # records go to the handlers of the process
            log_level=logging.ERROR,  # a client must not be able to fill the log
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=limits.idle_s,
        )
        config.load()
        self._uvicorn = uvicorn.Server(config)
        self._uvicorn.lifespan = config.lifespan_class(config)
        self._tending: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._until = inf  # when it ends at the latest, in the loop's time

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._uvicorn.server_state.connections)

    @property
    def idle(self) -> bool:
        """Whether no request is running."""
        return not self._uvicorn.server_state.tasks

    async def start(self, host: str, port: int) -> int:
        """Binds, starts serving and returns the port. Raises ConfigError where the address cannot be bound."""
        try:
            listener = await asyncio.to_thread(_bound, host, port, self._share_port)
        except OSError as error:
            raise ConfigError(
                "gateway.http_port", port, f"cannot listen on {host}: {error.strerror or error}"
            ) from None
        bound: int = listener.getsockname()[1]
        await self._uvicorn.startup(sockets=[listener])
        self._tending = supervise("http server", self._tend)
        return bound

    async def stop(self, grace_s: float) -> None:
        """Refuses new connections, gives running requests `grace_s` seconds to end, then cuts them.

        A second `stop` waits for the first, and may give less time.
        """
        self._until = min(self._until, asyncio.get_running_loop().time() + grace_s)
        if self._stopping is None:
            self._stopping = spawn("http server stop", self._stop())
        await asyncio.shield(self._stopping)

    async def _tend(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._uvicorn.on_tick(0)  # renews the header Date
            now = loop.time()
            for connection in list(self._uvicorn.server_state.connections):
                connection.look(now)  # type: ignore[union-attr]  # all are of Connections' making
            await asyncio.sleep(LOOK_S)

    async def _stop(self) -> None:
        if self._tending is None:
            return
        state, clock = self._uvicorn.server_state, asyncio.get_running_loop().time
        for server in self._uvicorn.servers:
            server.close()
        for connection in list(state.connections):
            connection.shutdown()  # closes it, at the latest with the response that it waits for
        while (state.connections or state.tasks) and clock() < self._until:
            await asyncio.sleep(WATCH_S)
        for connection in list(state.connections):
            connection.cut()  # type: ignore[union-attr]
        if state.tasks:
            await asyncio.wait(set(state.tasks), timeout=CUT_S)
        for task in (left := set(state.tasks)):
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CUT_S)
        self._tending.cancel()


def _bound(host: str, port: int, share: bool) -> socket.socket:
    """Returns a socket that is bound to the address. It resolves a name, so it must not run on the event loop."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # "::" is every interface, as for gRPC
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # connections inherit it
        for option, value in _PROBES.items():
            if hasattr(socket, option):
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener
