"""Builds all gRPC servers, each with the standard health service and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moiety.core.supervise import spawn
from moiety.errors import ConfigError
from moiety.wire.channels import COMMON_OPTIONS, KEEPALIVE_MS
from moiety.wire.guard import Guard

FEW_STREAMS = 256  # per connection, where the peers are services: each holds one or two open, and asks some more
_OPTIONS = [
    *COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_metadata_size", 8 << 10),  # headers of one RPC; beyond, gRPC refuses it at the latest at twice that
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.server_handshake_timeout_ms", 5000),  # a connection that says nothing
    ("grpc.max_connection_idle_ms", 600_000),  # without any RPC; clients connect again by themselves
]


class Server:
    """A grpc.aio server with the standard health and reflection services."""

    def __init__(
        self,
        handlers: Sequence[grpc.GenericRpcHandler],
        services: Sequence[str],
        *,
        share_port: bool = False,
        streams: int = FEW_STREAMS,
    ):
        """`services`: full names for health and reflection to report, such as moiety.v1.GenerationService.

        `share_port`: other processes may listen on the same port. `streams`: RPCs that one connection may have open; a
        client's library keeps further ones back until others end.
        """
        own = [("grpc.so_reuseport", int(share_port)), ("grpc.max_concurrent_streams", streams)]
        self.grpc = grpc.aio.server(options=[*_OPTIONS, *own], interceptors=[Guard()])
        self._health = health.aio.HealthServicer()
        self._services = services
        self._stopping: asyncio.Task[None] | None = None
        if handlers:
            self.grpc.add_generic_rpc_handlers(tuple(handlers))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.grpc)

    async def start(self, host: str, port: int) -> int:
        """Binds, starts serving and returns the port. Raises ConfigError where the address cannot be bound."""
        try:
            bound = self.grpc.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise ConfigError("port", port, f"cannot listen on {host}: {error}") from None
        await self.grpc.start()
        await self._report(health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def stop(self, grace_s: float) -> None:
        """Refuses new RPCs immediately and gives running ones `grace_s` seconds to end. A second `stop` waits for the first."""
        if self._stopping is None:  # grpc.aio crashes with a segmentation fault where two stops overlap
            self._stopping = spawn("stop of a server", self._stop(grace_s))
        await asyncio.shield(self._stopping)

    async def _stop(self, grace_s: float) -> None:
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.grpc.stop(grace_s)

    async def _report(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *self._services):
            await self._health.set(service, status)
