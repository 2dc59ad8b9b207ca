"""What only shared memory has: which peers are accepted, a full segment, and peers that send invalid messages."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.core.experts import ExpertSet
from moiety.core.replica import WIRE_VERSION, Transport
from moiety.errors import PeerLost, ResourceExhausted
from moiety.internal.v1.experts_pb2 import (
    OUTCOME_INVALID,
    OUTCOME_OK,
    DescribeReplicaResponse,
    ForwardRequest,
    ForwardResponse,
    SharedMemoryHello,
    SharedMemoryWelcome,
)
from moiety.registry.memory import MemoryRegistry
from moiety.testing import (
    SYSTEM,
    Caller,
    FakeExperts,
    eventually,
    fake_shape,
    fake_system,
    loopback_hop,
    open_caller,
    owner_of,
)
from moiety.wire import codec
from moiety.wire.rows import RowBuffer
from moiety.wire.transports.connection import MOST_UNASKED
from moiety.wire.transports.doorbell import ANSWER, CALL
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_connection import SharedMemoryConnection
from moiety.wire.transports.shm_segment import Allocator, aligned, create_segment

pytestmark = pytest.mark.timeout(20)

SHAPE = fake_shape(layers=1, experts=2, hidden=16)
ROW_BYTES = 4 * SHAPE.mlp.hidden


@asynccontextmanager
async def replica() -> AsyncIterator[tuple[FakeExperts, str]]:
    """Runs a replica; yields it and the name of its shared-memory socket."""
    experts = FakeExperts("a", ExpertSet.uniform(1, range(2)), SHAPE)
    await experts.start(MemoryRegistry())
    try:
        async with open_caller(experts.replica.address) as caller:
            name = caller.link.description.shared_memory
        yield experts, name
    finally:
        await experts.vanish()


def ask(caller: Caller, call_id: int, rows: int = 1) -> asyncio.Future:
    """Sends rows of zeros for expert 0."""
    offsets, experts = codec.int32_bytes(torch.arange(rows + 1).numpy()), bytes(4 * rows)
    header = ForwardRequest(call_id=call_id, rows=rows, dtype="float32", k_offsets=offsets, experts=experts)
    return caller.send(header, RowBuffer.within(memoryview(bytes(rows * ROW_BYTES)), ROW_BYTES))


# Handshake -----------------------------------------------------------------------------------------------------


async def greet(name: str, hello: bytes, descriptors: list[int]) -> SharedMemoryWelcome:
    """Sends a hello; returns the replica's answer."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, f"\0{name}")
        socket.send_fds(sock, [hello], descriptors)
        return SharedMemoryWelcome.FromString(await loop.sock_recv(sock, 4096))


async def test_only_a_sealed_segment_of_the_same_system_is_accepted():
    """Another system, no segment, an unsealed one and garbage are refused with a reason; the next router is served."""
    good = SharedMemoryHello(wire_version=WIRE_VERSION, system=str(SYSTEM), dtype="float32")
    other = SharedMemoryHello(wire_version=WIRE_VERSION, system=str(fake_system(groups=4)), dtype="float32")
    async with replica() as (experts, name):
        sealed, _ = create_segment(4096)
        unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, 4096)
        try:
            for hello, descriptors, reason in (
                (good.SerializeToString(), [sealed], ""),
                (other.SerializeToString(), [sealed], f"belongs to {SYSTEM}, its rows are float32"),
                (good.SerializeToString(), [], "the hello came without a segment"),
                (good.SerializeToString(), [unsealed], "segment = '4096 bytes, seals 0x0': must be sealed memory"),
                (b"\xff\xff", [sealed], "Error parsing message"),
            ):
                welcome = await greet(name, hello, descriptors)
                assert (welcome.accepted, reason in welcome.refusal) == (not reason, True)
        finally:
            os.close(sealed)
            os.close(unsealed)
        async with open_caller(experts.replica.address, Transport.SHM) as caller:
            assert (await ask(caller, 1)).header.rows == 1


# Invalid messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [b"garbage", CALL.pack(1 << 40, 64, 64, 64), CALL.pack(0, 1 << 31, 0, 0), CALL.pack(0, 0, 0, 64)],
    ids=["no call", "far outside", "too long", "no header there"],
)
async def test_an_invalid_call_ends_its_connection_only(message: bytes):
    """A replica closes the connection that sent an invalid message, and serves its other routers."""
    async with replica() as (experts, name), open_caller(experts.replica.address, Transport.SHM) as other:
        loop = asyncio.get_running_loop()
        descriptor, segment = create_segment(4096)
        segment[:64] = b"\xff" * 64
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, f"\0{name}")
            hello = SharedMemoryHello(wire_version=WIRE_VERSION, system=str(SYSTEM), dtype="float32")
            socket.send_fds(sock, [hello.SerializeToString()], [descriptor])
            os.close(descriptor)
            assert SharedMemoryWelcome.FromString(await loop.sock_recv(sock, 4096)).accepted
            await loop.sock_sendall(sock, message)
            assert await loop.sock_recv(sock, 4096) == b""
        assert (await ask(other, 1)).header.rows == 1


@asynccontextmanager
async def answered_by_hand(answers: list, unasked: list) -> AsyncIterator[tuple[SharedMemoryConnection, socket.socket]]:
    """Yields a connection with one open call, and the socket of a replica that the test plays."""
    loop, name = asyncio.get_running_loop(), f"moiety-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        listener.setblocking(False)
        mailbox = Mailbox()
        with owner_of(mailbox):
            opening = asyncio.create_task(
                SharedMemoryConnection.open(
                    DescribeReplicaResponse(shared_memory=name), mailbox, 5, 4096, lambda: unasked.append(1)
                )
            )
            sock, _ = await loop.sock_accept(listener)
            with sock:
                sock.setblocking(False)
                await loop.sock_recv(sock, 4096)
                await loop.sock_sendall(sock, SharedMemoryWelcome(accepted=True).SerializeToString())
                connection = await opening
                buffer = connection.acquire(ForwardRequest(call_id=1), rows=1, row_bytes=ROW_BYTES, reply_rows=1)
                mailbox.post(lambda: buffer.send(answers.append))
                await loop.sock_recv(sock, 4096)
                yield connection, sock
            await connection.close()
            mailbox.drain()


@pytest.mark.parametrize("answer", [b"x", ANSWER.pack(0) + b"\xff"], ids=["too short", "no reply"])
async def test_an_answer_that_cannot_be_read_ends_the_connection(answer: bytes):
    """Every open call gets PeerLost with the reason."""
    answers: list = []
    async with answered_by_hand(answers, []) as (connection, sock):
        await asyncio.get_running_loop().sock_sendall(sock, answer)
        await asyncio.wait_for(connection.closed.wait(), 5)
        await eventually(lambda: bool(answers))
        assert isinstance(answers[0], PeerLost)
        assert "it sent an answer that cannot be read" in str(answers[0])


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER.pack(64) + ForwardResponse(call_id=1).SerializeToString(),
        ANSWER.pack(0) + ForwardResponse(call_id=2).SerializeToString(),
    ],
    ids=["no such range", "another call"],
)
async def test_an_answer_that_nobody_asked_for_is_dropped_and_counted(answer: bytes):
    """The open call still gets its own answer, and the liar is reported once per answer."""
    answers, unasked = [], []
    async with answered_by_hand(answers, unasked) as (_, sock):
        loop = asyncio.get_running_loop()
        for message in (answer, answer, ANSWER.pack(0) + ForwardResponse(call_id=1, rows=7).SerializeToString()):
            await loop.sock_sendall(sock, message)
        await eventually(lambda: bool(answers))
        assert (answers[0].header.rows, len(unasked)) == (7, 2)


async def test_a_flood_of_answers_that_nobody_asked_for_ends_the_connection():
    """After MOST_UNASKED of them, reading more is no use: open calls get PeerLost and go elsewhere."""
    answers: list = []
    async with answered_by_hand(answers, []) as (connection, sock):
        message = ANSWER.pack(64) + ForwardResponse(call_id=9).SerializeToString()
        with suppress(ConnectionError):  # the last ones find it closed
            for _ in range(MOST_UNASKED + 1):
                await asyncio.get_running_loop().sock_sendall(sock, message)
        await asyncio.wait_for(connection.closed.wait(), 5)
        await eventually(lambda: bool(answers))
        assert f"over {MOST_UNASKED} answers that fit no open call" in str(answers[0])


async def test_more_rows_than_there_is_room_for_are_never_read():
    """A reply that announces more bytes than its range has is an invalid answer to its call, and has no rows."""
    answers: list = []
    async with answered_by_hand(answers, []) as (_, sock):
        lie = ForwardResponse(call_id=1, outcome=OUTCOME_OK, payload_bytes=1 << 20)
        await asyncio.get_running_loop().sock_sendall(sock, ANSWER.pack(0) + lie.SerializeToString())
        await eventually(lambda: bool(answers))
        assert (answers[0].header.outcome, len(answers[0].payload)) == (OUTCOME_INVALID, 0)
        assert "announced 1048576 bytes" in answers[0].header.detail


# Full ----------------------------------------------------------------------------------------------------------


async def test_a_full_segment_refuses_and_goes_on(monkeypatch: pytest.MonkeyPatch):
    """Calls that do not fit raise at once; calls in flight are answered, and their memory is reused."""
    monkeypatch.setattr("moiety.wire.transports.shm_connection.SEGMENT_BYTES", 1024)
    released = asyncio.Event()

    async def wait(_call: object) -> None:
        await released.wait()

    async with replica() as (experts, _):
        experts.on_call = wait
        async with open_caller(experts.replica.address, Transport.SHM) as caller:
            answers = [ask(caller, call_id) for call_id in range(8)]
            refusals = await asyncio.gather(*answers[5:], return_exceptions=True)
            assert {type(refusal) for refusal in refusals} == {ResourceExhausted}
            assert "fill its 1024 bytes of shared memory" in str(refusals[0])
            released.set()
            for _ in range(3):
                accepted = await asyncio.gather(*answers, return_exceptions=True)
                served = [answer for answer in accepted if not isinstance(answer, ResourceExhausted)]
                assert len(served) == 1024 // (3 * aligned(ROW_BYTES))
                answers = [ask(caller, 10 + call_id) for call_id in range(len(served))]


async def test_a_layer_waits_for_free_memory(monkeypatch: pytest.MonkeyPatch):
    """A hop over a segment that holds one call at a time gets all its rows by retrying."""
    monkeypatch.setattr("moiety.wire.transports.shm_connection.SEGMENT_BYTES", 512)
    monkeypatch.setattr("moiety.router.hop.call.MAX_CALL_BYTES", ROW_BYTES)
    only = FakeExperts("a", ExpertSet.uniform(1, range(2)), SHAPE)
    async with loopback_hop([only], SHAPE, transport=Transport.SHM) as lane:
        rows = await lane.compute(0, torch.ones(4, SHAPE.mlp.hidden), torch.zeros(4, 1, dtype=torch.int64))
        assert torch.equal(rows[0], rows[3])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=60))
def test_ranges_never_overlap_and_all_come_back(steps: list[tuple[bool, int]]):
    """For any order of allocations and releases, no two ranges share a byte, and in the end all memory is free."""
    allocator, taken = Allocator(4096), {}
    for take, size in steps:
        if take and (start := allocator.allocate(size)) is not None:
            assert 0 <= start <= 4096 - aligned(size)
            for other, length in taken.items():
                assert start + aligned(size) <= other or other + aligned(length) <= start
            taken[start] = size
        elif taken:
            start = sorted(taken)[size % len(taken)]
            allocator.release(start, taken.pop(start))
    for start, size in taken.items():
        allocator.release(start, size)
    assert allocator.allocate(4096) == 0


async def test_a_hello_that_does_not_come_is_refused_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The router and the log are told what was missing."""
    monkeypatch.setattr("moiety.wire.transports.shm_listener.HANDSHAKE_S", 0.1)
    async with replica() as (_, name):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, f"\0{name}")
            welcome = SharedMemoryWelcome.FromString(await loop.sock_recv(sock, 4096))
    assert welcome.refusal == "the hello did not come within 0.1 s"
    assert "refused a router's shared-memory connection: the hello did not come within 0.1 s" in caplog.text
