"""The doorbell of a shared-memory connection: a unix socket that keeps message boundaries and tells of the peer's death.

When the peer's process ends, however it ends, the kernel closes its end, and ours reads the end of the file at once.

A call is one range of the segment, which the router owns: [rows | room for the answer's rows | ForwardRequest], each part
aligned. The router rings with CALL, the replica writes the answer's rows into their room and rings with ANSWER and the
ForwardResponse behind it; from then on the range is the router's again. So only one side allocates, and neither side ever
waits for room of the other's.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Callable

from moiety.errors import PeerLost
from moiety.wire.transports.mailbox import READABLE, WRITABLE, Mailbox

MESSAGE_BYTES = 8192  # more is cut by the kernel, and then no message any more
CALL = struct.Struct(
    "<QIII"
)  # start of the range; bytes of the rows, of the room for the answer, of the ForwardRequest
ANSWER = struct.Struct("<Q")  # start of the range
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def check_peer(sock: socket.socket) -> None:
    """Raises PeerLost unless the process at the other end belongs to our user."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    if uid != os.geteuid():
        raise PeerLost(f"process {pid} at the other end belongs to user {uid}, not to {os.geteuid()} as this one does")


class Doorbell:
    """One end. Everything but `hang_up` belongs to the mailbox's owner, and so do the calls of `heard` and `lost`."""

    def __init__(
        self, sock: socket.socket, mailbox: Mailbox, heard: Callable[[bytes], None], lost: Callable[[str], None]
    ):
        """`heard` gets each message; `lost`, once, why there will be no more."""
        self._socket, self._mailbox, self._heard, self._lost = sock, mailbox, heard, lost
        self._unsent: deque[bytes] = deque()  # bounded by the segment: every message is about a range of it
        self._open = True
        sock.setblocking(False)
        mailbox.post(lambda: mailbox.watch(sock, self._ready))

    def ring(self, message: bytes) -> None:
        """Sends without blocking: a peer that does not read is written to when it does."""
        if self._unsent:
            self._unsent.append(message)
            return
        try:
            self._socket.send(message)
        except BlockingIOError:
            self._unsent.append(message)
            self._mailbox.watch(self._socket, self._ready, READABLE | WRITABLE)
        except OSError as error:
            self.hang_up(f"it cannot be written to: {error.strerror}")

    def hang_up(self, why: str) -> None:
        """`end` for other threads than the owner's."""
        self._mailbox.post(lambda: self.end(why))

    def end(self, why: str) -> None:
        """Ends it; harmless when it has ended."""
        if not self._open:
            return
        self._open = False
        self._mailbox.unwatch(self._socket)
        self._socket.close()
        self._unsent.clear()
        lost = self._lost
        self._heard = self._lost = _nobody  # who listened, and the segment with it, is free to go
        lost(why)

    def _ready(self, mask: int) -> None:
        try:
            if mask & WRITABLE:
                self._send_rest()
            if not mask & READABLE:
                return
            if message := self._socket.recv(MESSAGE_BYTES):
                self._heard(message)
            else:
                self.end("its process ended, or closed the connection")
        except BlockingIOError:
            return
        except OSError as error:
            self.end(f"it cannot be read: {error.strerror}")

    def _send_rest(self) -> None:
        while self._unsent:
            self._socket.send(self._unsent[0])
            self._unsent.popleft()
        self._mailbox.watch(self._socket, self._ready)


def _nobody(_: object) -> None:
    """Hears nothing."""
