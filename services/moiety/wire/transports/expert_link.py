"""The router's link to one expert replica: the replica's description, and the connection that carries calls to it."""

from __future__ import annotations

import logging

import grpc

from moiety.core.experts import ExpertSet
from moiety.core.replica import Transport
from moiety.errors import FailedPrecondition, InvalidRequest, MoietyError
from moiety.internal.v1.experts_pb2 import DescribeReplicaRequest, DescribeReplicaResponse
from moiety.internal.v1.experts_pb2_grpc import ExpertServiceStub
from moiety.policy.dispatch import ReplicaHolding
from moiety.wire import status
from moiety.wire.channels import channel
from moiety.wire.transports.connection import Connection
from moiety.wire.transports.grpc_connection import GrpcConnection
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_connection import SharedMemoryConnection
from moiety.wire.transports.shm_segment import AVAILABLE

_log = logging.getLogger(__name__)


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
    ):
        self.description = description  # the replica's latest answer to DescribeReplica
        self.transport, self.connection = transport, connection
        self._channel = grpc_channel

    @classmethod
    async def open(
        cls, address: str, timeout_s: float, mailbox: Mailbox, transport: Transport = Transport.AUTO
    ) -> ExpertLink:
        """Asks the replica at `address` for its description, then connects to it. Each step may take `timeout_s` seconds.

        Answers to calls arrive through `mailbox`. Transport.AUTO uses shared memory if it reaches the replica, else gRPC.
        Raises PeerLost or another error with which DescribeReplica failed, InvalidRequest if the sets of experts in the
        description cannot be parsed, FailedPrecondition if `transport` cannot reach the replica.
        """
        grpc_channel = channel(address)
        try:
            description = await _describe(grpc_channel, timeout_s)
            if transport in (Transport.AUTO, Transport.SHM):
                try:
                    connection = await _shared_memory(description, mailbox, timeout_s)
                    return cls(description, Transport.SHM, connection, grpc_channel)
                except MoietyError as error:
                    if transport is Transport.SHM:
                        raise FailedPrecondition(f"{address} cannot be reached by shared memory: {error}") from None
                    _log.debug("%s is reached by gRPC, because shared memory failed: %s", address, error)
            return cls(description, Transport.GRPC, GrpcConnection(address, grpc_channel, mailbox), grpc_channel)
        except BaseException:
            await grpc_channel.close()
            raise

    async def describe(self, timeout_s: float) -> DescribeReplicaResponse:
        """Asks the replica for its description again, stores it and returns it.

        A router does so after the replica has refused a call, because the replica lacks an expert or serves another
        revision. Raises PeerLost or another error with which DescribeReplica failed, or InvalidRequest as `open` does.
        """
        self.description = await _describe(self._channel, timeout_s)
        return self.description

    @property
    def holding(self) -> ReplicaHolding:
        """The replica's experts, by its latest description."""
        latest = self.description
        return ReplicaHolding(ExpertSet.parse(latest.held), ExpertSet.parse(latest.leaving), latest.placement_epoch)

    async def close(self) -> None:
        """Closes the link; unanswered calls get PeerLost."""
        await self.connection.close()
        await self._channel.close()


async def _shared_memory(
    description: DescribeReplicaResponse, mailbox: Mailbox, timeout_s: float
) -> SharedMemoryConnection:
    if not description.shared_memory:
        raise FailedPrecondition("the replica does not offer it")
    if not AVAILABLE:
        raise FailedPrecondition("this system has no memfd_create")
    return await SharedMemoryConnection.open(description, mailbox, timeout_s)


async def _describe(grpc_channel: grpc.aio.Channel, timeout_s: float) -> DescribeReplicaResponse:
    describe = ExpertServiceStub(grpc_channel).DescribeReplica
    try:
        description: DescribeReplicaResponse = await describe(DescribeReplicaRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        raise status.error_of(error) from None
    for field, text in (("held", description.held), ("leaving", description.leaving)):
        try:
            ExpertSet.parse(text)
        except ValueError as error:
            raise InvalidRequest(field, text, f"a set of experts: {error}") from None
    return description
