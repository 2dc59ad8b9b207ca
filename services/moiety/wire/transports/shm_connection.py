"""The router's end of a shared-memory connection: one segment and one doorbell, see `doorbell.py`."""

from __future__ import annotations

import asyncio
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from google.protobuf.message import DecodeError

from moiety.core.replica import WIRE_VERSION
from moiety.errors import FailedPrecondition, PeerLost, ResourceExhausted
from moiety.internal.v1.experts_pb2 import (
    OUTCOME_INVALID,
    DescribeReplicaResponse,
    ForwardRequest,
    ForwardResponse,
    SharedMemoryHello,
    SharedMemoryWelcome,
)
from moiety.wire.rows import RowBuffer
from moiety.wire.transports.connection import MOST_UNASKED, Answer, Reply
from moiety.wire.transports.doorbell import ANSWER, CALL, CANCEL, MESSAGE_BYTES, Doorbell, check_peer
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_segment import SEGMENT_BYTES, Allocator, aligned, create_segment


@dataclass(slots=True)
class _Range:
    """The Buffer of one call: a range of the segment, occupied until the call is answered."""

    connection: SharedMemoryConnection
    key: tuple[int, int]  # call id, attempt
    start: int
    size: int
    rows_bytes: int
    reply_bytes: int
    header_bytes: int
    rows: RowBuffer

    def send(self, answer: Answer) -> None:
        self.connection.send(self, answer)


class SharedMemoryConnection:
    """A Connection through shared memory to a replica on the same node."""

    def __init__(
        self, peer: str, sock: socket.socket, segment: mmap.mmap, mailbox: Mailbox, on_unasked: Callable[[], None]
    ):
        self.closed = asyncio.Event()
        self._peer, self._mailbox = peer, mailbox
        self._segment: mmap.mmap | None = segment  # None once the connection is lost, so that the memory is freed
        self._allocator = Allocator(len(segment))
        self._calls: dict[int, tuple[_Range, Answer]] = {}  # by the start of their range
        self._on_unasked, self._unasked = on_unasked, 0
        self._lost: PeerLost | None = None
        self._loop = asyncio.get_running_loop()
        self._hang_up = self._watch_for_hang_up(sock)
        self._doorbell = Doorbell(sock, mailbox, self._on_message, self._break)

    @classmethod
    async def open(
        cls,
        description: DescribeReplicaResponse,
        mailbox: Mailbox,
        timeout_s: float,
        size: int | None = None,
        on_unasked: Callable[[], None] = lambda: None,
    ) -> SharedMemoryConnection:
        """Connects to the replica that sent `description`, with a segment of `size` bytes (default SEGMENT_BYTES).

        Raises PeerLost if the replica is not on this node, belongs to another user or does not answer within `timeout_s`
        seconds, or this process has no free descriptor, and FailedPrecondition if it refuses the connection.
        """
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:  # no free descriptor
            raise _not_connected(error) from None
        try:
            sock.setblocking(False)
            async with asyncio.timeout(timeout_s):
                segment = await _shake_hands(sock, description, size or SEGMENT_BYTES)
            return cls(description.shared_memory, sock, segment, mailbox, on_unasked)
        except (OSError, DecodeError, TimeoutError) as error:
            sock.close()
            raise _not_connected(error) from None
        except BaseException:
            sock.close()
            raise

    def acquire(self, header: ForwardRequest, *, rows: int, row_bytes: int, reply_rows: int) -> _Range:
        rows_bytes, reply_bytes = rows * row_bytes, reply_rows * row_bytes
        key = header.call_id, header.attempt
        if self._segment is None:
            return _Range(self, key, 0, 0, rows_bytes, reply_bytes, 0, RowBuffer.empty(rows, row_bytes))
        header.payload_bytes = rows_bytes
        header.sent_ns = time.monotonic_ns()
        message = header.SerializeToString()
        into = aligned(rows_bytes) + aligned(reply_bytes)
        size = into + len(message)
        start = self._allocator.allocate(size)
        if start is None:
            detail = f"{len(self._calls)} unanswered calls to {self._peer} fill its {len(self._segment)} bytes"
            raise ResourceExhausted(f"{detail} of shared memory", 0.05)
        self._segment[start + into : start + size] = message
        view = RowBuffer.within(self._segment, row_bytes, rows, start)
        return _Range(self, key, start, size, rows_bytes, reply_bytes, len(message), view)

    async def close(self) -> None:
        self._doorbell.hang_up("closed by this side")
        self._gone()

    def send(self, call: _Range, answer: Answer) -> None:
        """Announces a call, whose rows and header are in its range of the segment."""
        if self._lost is not None:
            self._mailbox.post(partial(answer, self._lost))
            return
        self._calls[call.start] = call, answer
        self._doorbell.ring(CALL.pack(call.start, call.rows_bytes, call.reply_bytes, call.header_bytes))

    def cancel(self, call_id: int, attempt: int) -> None:
        if any(call.key == (call_id, attempt) for call, _ in self._calls.values()):
            self._doorbell.ring(CANCEL.pack(call_id, attempt))

    def _on_message(self, message: bytes) -> None:
        assert self._segment is not None, "a lost connection receives no message"
        try:
            (start,) = ANSWER.unpack_from(message)
            header = ForwardResponse.FromString(message[ANSWER.size :])
        except (struct.error, DecodeError) as error:
            self._doorbell.end(f"it sent an answer that cannot be read ({type(error).__name__})")
            return
        if start not in self._calls or (header.call_id, header.attempt) != self._calls[start][0].key:
            self._count_unasked()
            return
        call, answer = self._calls.pop(start)
        at = start + aligned(call.rows_bytes)
        if header.payload_bytes > call.reply_bytes:
            detail = f"it announced {header.payload_bytes} bytes of rows, and there is room for {call.reply_bytes}"
            header = ForwardResponse(
                call_id=header.call_id, attempt=header.attempt, outcome=OUTCOME_INVALID, detail=detail
            )
        try:
            answer(Reply(header, memoryview(self._segment)[at : at + header.payload_bytes]))
        finally:
            self._allocator.release(start, call.size)

    def _count_unasked(self) -> None:
        self._unasked += 1
        self._on_unasked()
        if self._unasked > MOST_UNASKED:
            self._doorbell.end(f"it sent over {MOST_UNASKED} answers that fit no open call")

    def _break(self, why: str) -> None:
        self._lost = PeerLost(f"the connection to {self._peer} broke: {why}")
        self._segment = None
        calls, self._calls = self._calls, {}
        for _, answer in calls.values():
            self._mailbox.post(partial(answer, self._lost))
        with suppress(RuntimeError):  # the loop is closed: nothing waits for `closed` any more
            self._loop.call_soon_threadsafe(self._gone)

    # On the loop: `closed` must also be set when a replica dies while no call is in flight -------------------------

    def _watch_for_hang_up(self, sock: socket.socket) -> select.epoll:
        """Makes the asyncio loop call `_gone` when the peer closes the socket.

        The loop watches an epoll object that reports nothing else. If it watched the socket, each message would wake it,
        though the mailbox's owner reads the messages.
        """
        hang_up = select.epoll()
        hang_up.register(sock, select.EPOLLRDHUP)
        self._loop.add_reader(hang_up, self._gone)
        return hang_up

    def _gone(self) -> None:
        if not self._hang_up.closed:
            self._loop.remove_reader(self._hang_up)
            self._hang_up.close()
        self.closed.set()


def _not_connected(error: Exception) -> PeerLost:
    return PeerLost(f"connecting to its shared memory failed: {str(error) or 'no answer'}")


async def _shake_hands(sock: socket.socket, description: DescribeReplicaResponse, size: int) -> mmap.mmap:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, f"\0{description.shared_memory}")
    check_peer(sock)
    descriptor, segment = create_segment(size)
    try:
        hello = SharedMemoryHello(wire_version=WIRE_VERSION, system=description.system, dtype=description.dtype)
        socket.send_fds(sock, [hello.SerializeToString()], [descriptor])
    finally:
        os.close(descriptor)
    welcome = await loop.sock_recv(sock, MESSAGE_BYTES)
    answer = SharedMemoryWelcome.FromString(welcome)
    if not answer.accepted:
        raise FailedPrecondition(answer.refusal or "it closed the connection")
    return segment
