"""The router's link to one expert replica: the replica's description, and the connection that carries calls to it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import grpc

from moiety.core.experts import ExpertSet, ModelShape
from moiety.core.replica import Transport
from moiety.errors import FailedPrecondition, InvalidRequest, MoietyError
from moiety.internal.v1.experts_pb2 import DescribeReplicaRequest, DescribeReplicaResponse
from moiety.internal.v1.experts_pb2_grpc import ExpertServiceStub
from moiety.policy.dispatch import ReplicaHolding
from moiety.wire import status
from moiety.wire.channels import MAX_MESSAGE_BYTES, channel
from moiety.wire.transports.connection import Connection
from moiety.wire.transports.grpc_connection import GrpcConnection
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_connection import SharedMemoryConnection
from moiety.wire.transports.shm_segment import AVAILABLE

_log = logging.getLogger(__name__)
REPLY_BYTES = MAX_MESSAGE_BYTES // 2 + (1 << 20)  # the rows of the largest call that a router sends, and a header


class ExpertLink:
    """A router's open connection to one expert replica, and a gRPC channel for DescribeReplica.

    The methods run on one asyncio loop; calls are sent through `connection` on the thread that owns the mailbox.
    """

    def __init__(
        self,
        description: DescribeReplicaResponse,
        transport: Transport,
        connection: Connection,
        grpc_channel: grpc.aio.Channel,
        shape: ModelShape | None = None,
    ):
        self.description = description  # the replica's latest answer to DescribeReplica
        self.transport, self.connection = transport, connection
        self._channel, self._shape = grpc_channel, shape

    @classmethod
    async def open(
        cls,
        address: str,
        timeout_s: float,
        mailbox: Mailbox,
        transport: Transport = Transport.AUTO,
        shape: ModelShape | None = None,
        on_unasked: Callable[[], None] = lambda: None,
    ) -> ExpertLink:
        """Asks the replica at `address` for its description, then connects to it. Each step may take `timeout_s` seconds.

        Answers to calls arrive through `mailbox`. Transport.AUTO uses shared memory if it reaches the replica, else gRPC.
        `shape` bounds the sets of experts that the replica may name. `on_unasked`: see `Connection`.

        Raises PeerLost or another error with which DescribeReplica failed, InvalidRequest if the sets of experts in the
        description cannot be parsed, FailedPrecondition if `transport` cannot reach the replica.
        """
        grpc_channel = channel(address, receive_bytes=REPLY_BYTES)
        try:
            description = await _describe(grpc_channel, timeout_s, shape)
            if transport in (Transport.AUTO, Transport.SHM):
                try:
                    connection = await _shared_memory(description, mailbox, timeout_s, on_unasked)
                    return cls(description, Transport.SHM, connection, grpc_channel, shape)
                except MoietyError as error:
                    if transport is Transport.SHM:
                        raise FailedPrecondition(f"{address} cannot be reached by shared memory: {error}") from None
                    _log.debug("%s is reached by gRPC, because shared memory failed: %s", address, error)
            stream = GrpcConnection(address, grpc_channel, mailbox, on_unasked)
            return cls(description, Transport.GRPC, stream, grpc_channel, shape)
        except BaseException:
            await grpc_channel.close()
            raise

    async def describe(self, timeout_s: float) -> DescribeReplicaResponse:
        """Asks the replica for its description again, stores it and returns it.

        A router does so after the replica has refused a call, because the replica lacks an expert or serves another
        revision. Raises PeerLost or another error with which DescribeReplica failed, or InvalidRequest as `open` does.
        """
        self.description = await _describe(self._channel, timeout_s, self._shape)
        return self.description

    @property
    def holding(self) -> ReplicaHolding:
        """The replica's experts, by its latest description."""
        latest = self.description
        held, leaving = _experts(latest.held, self._shape), _experts(latest.leaving, self._shape)
        return ReplicaHolding(held, leaving, latest.placement_epoch)

    async def close(self) -> None:
        """Closes the link; unanswered calls get PeerLost."""
        await self.connection.close()
        await self._channel.close()


async def _shared_memory(
    description: DescribeReplicaResponse, mailbox: Mailbox, timeout_s: float, on_unasked: Callable[[], None]
) -> SharedMemoryConnection:
    if not description.shared_memory:
        raise FailedPrecondition("the replica does not offer it")
    if not AVAILABLE:
        raise FailedPrecondition("this system has no memfd_create")
    return await SharedMemoryConnection.open(description, mailbox, timeout_s, on_unasked=on_unasked)


async def _describe(
    grpc_channel: grpc.aio.Channel, timeout_s: float, shape: ModelShape | None
) -> DescribeReplicaResponse:
    describe = ExpertServiceStub(grpc_channel).DescribeReplica
    try:
        description: DescribeReplicaResponse = status.parsed(
            await describe(DescribeReplicaRequest(), timeout=timeout_s)
        )
    except grpc.RpcError as error:
        raise status.error_of(error) from None
    for field, text in (("held", description.held), ("leaving", description.leaving)):
        try:
            _experts(text, shape)
        except ValueError as error:
            raise InvalidRequest(field, text[:80], f"a set of experts: {error}") from None
    return description


def _experts(text: str, shape: ModelShape | None) -> ExpertSet:
    return ExpertSet.parse(text, shape.moe_layers, shape.experts) if shape else ExpertSet.parse(text)
