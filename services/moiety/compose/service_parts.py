"""The parts of a service that `running.py` brings to life, and that differ between expert replicas, routers and gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from moiety.core.replica import Replica, Role
from moiety.wire.server import Server

Beat = Callable[[], Awaitable[None]]


async def _nothing() -> None: ...


class SideServer(Protocol):
    """A server that a service has beside its gRPC server."""

    async def start(self, host: str, port: int) -> int:
        """Binds, starts serving and returns the port."""

    async def stop(self, grace_s: float) -> None:
        """Refuses new work at once and gives running work `grace_s` seconds to end."""


@dataclass(frozen=True, slots=True)
class ServiceParts:
    """The parts that differ between expert replicas, routers and gateways; an argument of `ServiceStart.serve`."""

    role: Role
    server: Server
    idle: Callable[[], bool]
    healthy: Callable[[], None] = lambda: None  # raises Unavailable while the service is sick; called every LOOK_S
    reconfigure: Callable[[Mapping[str, Any]], Awaitable[None]] | None = None
    entry: Callable[[Replica], Replica] = lambda replica: replica  # updates the registry entry before each beat
    on_beat: Sequence[Beat] = ()
    port: int = 0  # 0 = a free one
    http: SideServer | None = None
    http_port: int = 0
    listening: AbstractAsyncContextManager[None] = field(default_factory=nullcontext)  # around the start of the servers
    work: Callable[[], int] = lambda: 0  # grows with each piece of work that the service accepts
    refuse: Callable[[], None] = lambda: None  # from now on new work is refused: the whole system ends
    cut: Callable[[], Awaitable[None]] = _nothing  # ends the work in flight with an error that says why
    calls_end: bool = True  # False if its RPCs are streams that stay open as long as the service

    async def stop(self, grace_s: float) -> None:
        """Stops the servers, all at once."""
        servers: list[SideServer] = [self.server, *([self.http] if self.http else [])]
        await asyncio.gather(*(server.stop(grace_s) for server in servers))
