"""Connections through shared memory that do not come about: each says why."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from moiety.errors import PeerLost
from moiety.internal.v1.experts_pb2 import (
    DescribeReplicaResponse,
)
from moiety.testing import (
    fake_shape,
)
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_connection import SharedMemoryConnection

pytestmark = pytest.mark.timeout(20)

SHAPE = fake_shape(layers=1, experts=2, hidden=16)
ROW_BYTES = 4 * SHAPE.mlp.hidden


async def test_a_socket_without_a_listener_is_lost():
    """Connecting to a replica that is gone or on another node raises PeerLost at once."""
    with pytest.raises(PeerLost, match=r"connecting to its shared memory failed: .*refused"):
        await SharedMemoryConnection.open(DescribeReplicaResponse(shared_memory="moiety-nobody"), Mailbox(), 5)


async def test_a_replica_that_does_not_answer_the_hello_is_lost():
    """The error says so; nothing is left open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind("\0moiety-silent")
        silent.listen()
        with pytest.raises(PeerLost, match="connecting to its shared memory failed: no answer"):
            await SharedMemoryConnection.open(DescribeReplicaResponse(shared_memory="moiety-silent"), Mailbox(), 0.1)


async def test_a_router_without_a_free_descriptor_says_so(monkeypatch: pytest.MonkeyPatch):
    """It raises PeerLost, like any other failure to connect."""

    def none_free(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("socket.socket", none_free)
    with pytest.raises(PeerLost, match=r"connecting to its shared memory failed: .*Too many open files"):
        await SharedMemoryConnection.open(DescribeReplicaResponse(shared_memory="moiety-any"), Mailbox(), 5)
