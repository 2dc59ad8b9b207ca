"""A fake gateway: says which system it is of, on a port that gateways of that system may share."""

from __future__ import annotations

import grpc

from moiety.core.system import SystemId
from moiety.internal.v1 import gateway_pb2, gateway_pb2_grpc
from moiety.testing.common import HOST, MODEL
from moiety.wire.server import Server
from moiety.wire.service_names import GATEWAY_SERVICE


class FakeGateway(gateway_pb2_grpc.GatewayServiceServicer):
    """A gateway without the public API; an async context manager that begins to listen at a free port."""

    def __init__(self, system: SystemId):
        self.port = 0
        self._system = system
        self._server = Server([], [GATEWAY_SERVICE], share_port=True)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self, self._server.grpc)

    async def start(self, port: int = 0) -> None:
        """Listens at `port`; 0 = a free one."""
        self.port = await self._server.start(HOST, port)

    async def stop(self) -> None:
        """Leaves the port."""
        await self._server.stop(0)

    async def __aenter__(self) -> FakeGateway:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def DescribeGateway(
        self, _request: gateway_pb2.DescribeGatewayRequest, _context: grpc.aio.ServicerContext
    ) -> gateway_pb2.DescribeGatewayResponse:
        return gateway_pb2.DescribeGatewayResponse(model=MODEL, system=str(self._system))
