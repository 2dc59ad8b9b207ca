"""The replica's end of shared-memory connections: accepts connections of routers and receives their calls."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import struct
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from google.protobuf.message import DecodeError

from moiety.core.replica import WIRE_VERSION
from moiety.core.supervise import spawn, supervise
from moiety.errors import InvalidRequest, MoietyError, PeerLost, WrongSystem
from moiety.internal.v1.experts_pb2 import (
    OUTCOME_INVALID,
    ForwardRequest,
    ForwardResponse,
    SharedMemoryHello,
    SharedMemoryWelcome,
)
from moiety.wire.frames import ReplyCallback
from moiety.wire.rows import RowBuffer, SelectedRows, copy_rows
from moiety.wire.transports.doorbell import ANSWER, CALL, CANCEL, MESSAGE_BYTES, Doorbell, check_peer
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_segment import aligned, map_segment

_log = logging.getLogger(__name__)

HANDSHAKE_S = 2.0
DETAIL_CHARACTERS = MESSAGE_BYTES // 8  # an answer's `detail` must fit into a message, in any alphabet

Accept = Callable[[ForwardRequest, memoryview, ReplyCallback, object], None]


class SharedMemoryListener:
    """Accepts routers' connections on the asyncio loop. The mailbox's owner reads their calls and passes each to `accept`.

    `accept(header, payload, answer, origin)` makes the mailbox's owner call `answer(reply, selected_rows)` once, during
    `accept` or later. The payload may be read until `answer` is called. `origin` tells connections apart. A header with
    `cancel` is not answered.
    """

    def __init__(self, system: str, dtype: str, row_bytes: int, mailbox: Mailbox, accept: Accept):
        self.name = f"moiety-{uuid.uuid4().hex}"  # in the abstract namespace: nothing to clean up
        self.peers: set[SharedMemoryPeer] = set()  # changed by the mailbox's owner
        self._system, self._dtype, self._row_bytes = system, dtype, row_bytes
        self._mailbox, self._accept = mailbox, accept
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(64)
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._greeting: set[asyncio.Task[None]] = set()
        self._task = supervise("shared-memory listener", self._listen)

    async def close(self) -> None:
        """Ends all connections; their routers send unanswered calls to other replicas."""
        tasks = [self._task, *self._greeting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()
        self._mailbox.post(self._close_peers)

    async def _listen(self) -> None:
        while True:
            sock, _ = await self._loop.sock_accept(self._socket)
            task = spawn("shared-memory handshake", self._greet(sock))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                segment = await self._shake_hands(sock)
        except (MoietyError, DecodeError, OSError, TimeoutError) as error:
            refusal = str(error)[:DETAIL_CHARACTERS] or f"the hello did not come within {HANDSHAKE_S:g} s"
            _log.warning("refused a router's shared-memory connection: %s", refusal)
            with suppress(OSError):
                sock.send(SharedMemoryWelcome(refusal=refusal).SerializeToString())
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            self._mailbox.post(lambda: self._admit(sock, segment))

    def _close_peers(self) -> None:
        for peer in tuple(self.peers):
            peer.close()

    def _admit(self, sock: socket.socket, segment: mmap.mmap) -> None:
        self.peers.add(
            SharedMemoryPeer(sock, segment, self._row_bytes, self._mailbox, self._accept, self.peers.discard)
        )

    async def _shake_hands(self, sock: socket.socket) -> mmap.mmap:
        sock.setblocking(False)
        check_peer(sock)
        readable = asyncio.Event()
        self._loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            self._loop.remove_reader(sock)
        message, descriptors, _, _ = socket.recv_fds(sock, MESSAGE_BYTES, 1)
        try:
            hello = SharedMemoryHello.FromString(message)
            if not descriptors:
                raise PeerLost("the hello came without a segment")
            if (hello.wire_version, hello.system, hello.dtype) != (WIRE_VERSION, self._system, self._dtype):
                raise WrongSystem(
                    f"this replica belongs to {self._system}, its rows are {self._dtype}, its wire version is {WIRE_VERSION}"
                )
            segment = map_segment(descriptors[0])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        sock.send(SharedMemoryWelcome(accepted=True).SerializeToString())
        return segment


class SharedMemoryPeer:
    """The replica's end of the connection to one router. Used on the thread of the mailbox's owner only."""

    def __init__(
        self,
        sock: socket.socket,
        segment: mmap.mmap,
        row_bytes: int,
        mailbox: Mailbox,
        accept: Accept,
        on_lost: Callable[[SharedMemoryPeer], None],
    ):
        self._segment, self._row_bytes, self._accept, self._on_lost = segment, row_bytes, accept, on_lost
        self._doorbell = Doorbell(sock, mailbox, self._on_message, self._lost)

    def close(self) -> None:
        self._doorbell.end("closed by this side")

    def _on_message(self, message: bytes) -> None:
        if len(message) == CANCEL.size:
            call_id, attempt = CANCEL.unpack(message)
            cancel = ForwardRequest(call_id=call_id, attempt=attempt, cancel=True)
            self._accept(cancel, memoryview(b""), lambda _reply, _rows: None, self)
            return
        try:
            start, rows_bytes, reply_bytes, header_bytes = CALL.unpack(message)
            reply_at = start + aligned(rows_bytes)
            header_at = reply_at + aligned(reply_bytes)
            if header_at + header_bytes > len(self._segment):
                raise InvalidRequest("range", message.hex(), f"within the segment's {len(self._segment)} bytes")
            header = ForwardRequest.FromString(self._segment[header_at : header_at + header_bytes])
        except (struct.error, DecodeError, InvalidRequest) as error:
            self._doorbell.end(f"it sent an invalid call: {error}")
            return
        payload = memoryview(self._segment).toreadonly()[start : start + rows_bytes]
        answer = partial(self._answer, start, reply_at)
        if len(header.experts) // 4 * self._row_bytes > reply_bytes:
            detail = f"the range has {reply_bytes} bytes for the answer, too few for {len(header.experts) // 4} rows"
            answer(
                ForwardResponse(call_id=header.call_id, attempt=header.attempt, outcome=OUTCOME_INVALID, detail=detail),
                None,
            )
            return
        self._accept(header, payload, answer, self)

    def _answer(self, start: int, reply_at: int, reply: ForwardResponse, picked: SelectedRows | None) -> None:
        reply.payload_bytes = 0
        if picked is not None and picked.nbytes:
            reply.payload_bytes = picked.nbytes
            into = RowBuffer.within(self._segment, picked.rows.row_bytes, len(picked.order), reply_at)
            copy_rows(picked.rows, into, chosen=picked.order)
        if reply.detail:
            reply.detail = reply.detail[:DETAIL_CHARACTERS]
        self._doorbell.ring(ANSWER.pack(start) + reply.SerializeToString())

    def _lost(self, why: str) -> None:
        _log.info("a router's shared-memory connection ended: %s", why)
        self._on_lost(self)
