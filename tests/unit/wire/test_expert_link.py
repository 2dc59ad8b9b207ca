"""The handshake with a replica, against a server whose answers are wrong."""

from __future__ import annotations

import grpc
import pytest

from moiety.errors import InvalidRequest
from moiety.internal.v1.experts_pb2 import DescribeReplicaRequest, DescribeReplicaResponse
from moiety.wire.server import Server
from moiety.wire.service_names import EXPERT_SERVICE
from moiety.wire.transports.expert_link import ExpertLink
from moiety.wire.transports.mailbox import Mailbox


async def test_an_unreadable_describe_is_refused_by_name() -> None:
    """A replica whose `held` cannot be parsed raises InvalidRequest with that value, not PeerLost."""

    async def describe(_request: DescribeReplicaRequest, _context: grpc.aio.ServicerContext) -> DescribeReplicaResponse:
        return DescribeReplicaResponse(held="all of them")

    method = grpc.unary_unary_rpc_method_handler(
        describe,
        request_deserializer=DescribeReplicaRequest.FromString,
        response_serializer=DescribeReplicaResponse.SerializeToString,
    )
    server = Server(
        [grpc.method_handlers_generic_handler(EXPERT_SERVICE, {"DescribeReplica": method})], [EXPERT_SERVICE]
    )
    port = await server.start("127.0.0.1", 0)
    try:
        with pytest.raises(InvalidRequest, match="held = 'all of them'"):
            await ExpertLink.open(f"127.0.0.1:{port}", 5.0, Mailbox())
    finally:
        await server.stop(0)
