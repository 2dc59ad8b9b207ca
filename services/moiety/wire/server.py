"""Builds all gRPC servers, each with the standard health service and reflection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moiety.core import address
from moiety.core.supervise import spawn
from moiety.errors import ConfigError
from moiety.wire.channels import GATEWAY_PINGS, SERVICE_PINGS, Pings, milliseconds, server_options
from moiety.wire.guard import Guard

FEW_STREAMS = 256  # per connection, where the peers are services: each holds one or two open, and asks some more
_OPTIONS = [
    ("grpc.http2.min_ping_interval_without_data_ms", 250),  # between two pings of a peer; fewer ms are a strike
    ("grpc.http2.max_ping_strikes", 0),  # no number of strikes ends a connection
    ("grpc.max_metadata_size", 8 << 10),  # headers of one RPC; beyond, gRPC refuses it at the latest at twice that
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.max_connection_idle_ms", 600_000),  # without any RPC; clients connect again by themselves
]


@dataclass(frozen=True, slots=True)
class Door:
    """How a server treats the connections of its peers. The defaults are for services as peers."""

    pings: Pings = SERVICE_PINGS
    handshake_s: float = 5.0  # a new connection that says nothing for so long is closed
    # A client leaves a connection of this age, give or take 10 %, and opens another one, which a load balancer may lead to
    # another server. RPCs that are open go on for the grace.
    max_age_s: float = inf
    max_age_grace_s: float = inf

    def options(self) -> list[tuple[str, int]]:
        """Returns the options of a server."""
        return [
            *server_options(self.pings),
            ("grpc.server_handshake_timeout_ms", milliseconds(self.handshake_s)),
            ("grpc.max_connection_age_ms", milliseconds(self.max_age_s)),
            ("grpc.max_connection_age_grace_ms", milliseconds(self.max_age_grace_s)),
        ]


SERVICE_DOOR = Door()


def public_door(max_age_s: float, max_age_grace_s: float | None) -> Door:
    """Returns the gateway's door: clients may be far away. `max_age_grace_s`: None = unlimited."""
    grace_s = inf if max_age_grace_s is None else max_age_grace_s
    return Door(GATEWAY_PINGS, handshake_s=20.0, max_age_s=max_age_s, max_age_grace_s=grace_s)


class Server:
    """A grpc.aio server with the standard health and reflection services."""

    def __init__(
        self,
        handlers: Sequence[grpc.GenericRpcHandler],
        services: Sequence[str],
        *,
        share_port: bool = False,
        door: Door = SERVICE_DOOR,
        streams: int = FEW_STREAMS,
    ):
        """`services`: full names for health and reflection to report, such as moiety.v1.GenerationService.

        `share_port`: other processes may listen on the same port.
        `streams`: RPCs that one connection may have open; a client's library keeps further ones back until others end.
        """
        own = [("grpc.so_reuseport", int(share_port)), ("grpc.max_concurrent_streams", streams), *door.options()]
        self.grpc = grpc.aio.server(options=[*_OPTIONS, *own], interceptors=[Guard()])
        self._health = health.aio.HealthServicer()
        self._services = services
        self._stopping: asyncio.Task[None] | None = None
        self._until = inf  # when it ends at the latest, in the loop's time
        if handlers:
            self.grpc.add_generic_rpc_handlers(tuple(handlers))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc)

    async def start(self, host: str, port: int) -> int:
        """Binds, starts serving and returns the port. Raises ConfigError where the address cannot be bound."""
        try:
            bound = self.grpc.add_insecure_port(address.joined(host, port))
        except RuntimeError:
            raise ConfigError("port", port, f"cannot listen on {host}: {_reason(host, port)}") from None
        await self.grpc.start()
        await self.report(serving=True)
        return bound

    async def report(self, *, serving: bool) -> None:
        """Makes the health service answer SERVING or NOT_SERVING. A server that stops is NOT_SERVING."""
        answer = health_pb2.HealthCheckResponse
        status = answer.SERVING if serving and self._stopping is None else answer.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Refuses new RPCs immediately and gives running ones `grace_s` seconds to end.

        A second `stop` waits for the first, or cuts it short if it gives less time. Then the first one ends as cancelled.
        """
        until = asyncio.get_running_loop().time() + grace_s
        if (first := self._stopping) is not None and until < self._until and not first.done():
            first.cancel()  # grpc.aio crashes with a segmentation fault where two stops overlap
            await asyncio.wait([first])
            if self._stopping is first:  # else another `stop` has begun anew meanwhile
                self._stopping = None
        if self._stopping is None:
            self._stopping, self._until = spawn("server stop", self._stop(grace_s)), until
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        await self.report(serving=False)
        await self.grpc.stop(grace_s)


def _reason(host: str, port: int) -> str:
    """Returns why nothing can be bound to the address, which gRPC does not say."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC could not"
