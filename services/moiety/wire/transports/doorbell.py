"""The doorbell of a shared-memory connection: a unix socket that keeps message boundaries and reports the peer's death.

When the peer's process ends, for whatever reason, the operating system closes its socket, and ours reads end of file.

Rows are passed in a segment, memory that the router created and both processes map (`shm_segment.py`). A call uses one
range of it: [rows | space for the answer's rows | ForwardRequest], each part aligned. The router sends CALL. The replica
writes the answer's rows into their space and sends ANSWER, followed by the ForwardResponse. Then the router may reuse the
range. So only the router allocates, and neither side waits for the other to free memory.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Callable

from moiety.errors import PeerLost
from moiety.wire.transports.mailbox import READABLE, WRITABLE, Mailbox

MOST_UNSENT = 16_384  # messages that wait for a peer that does not read; each belongs to an open call
MESSAGE_BYTES = 8192  # the kernel truncates a longer message, which then cannot be parsed
# CALL: start of the range; bytes of the rows, of the space for the answer's rows, of the ForwardRequest
CALL = struct.Struct("<QIII")
ANSWER = struct.Struct("<Q")  # start of the range
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def check_peer(sock: socket.socket) -> None:
    """Raises PeerLost unless the process at the other end of `sock` runs as the same user as this one."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    if uid != os.geteuid():
        raise PeerLost(f"the peer's process {pid} belongs to user {uid}, this process to user {os.geteuid()}")


class Doorbell:
    """One end of a doorbell's socket.

    The constructor and `hang_up` may be called from any thread, `ring` and `end` only on the thread that owns `mailbox`.
    """

    def __init__(
        self,
        sock: socket.socket,
        mailbox: Mailbox,
        on_message: Callable[[bytes], None],
        on_lost: Callable[[str], None],
    ):
        """`on_message` receives each message. `on_lost` is called once, with the reason, when the connection ends."""
        self._socket, self._mailbox, self._on_message, self._on_lost = sock, mailbox, on_message, on_lost
        self._unsent: deque[bytes] = deque()
        self._open = True
        sock.setblocking(False)
        mailbox.post(lambda: mailbox.watch(sock, self._ready))

    def ring(self, message: bytes) -> None:
        """Sends `message` without blocking. Messages that the socket cannot take yet wait in a queue of at most MOST_UNSENT."""
        if self._unsent:
            self._unsent.append(message)
            if len(self._unsent) > MOST_UNSENT:
                self.hang_up(f"it did not read {MOST_UNSENT} messages")
            return
        try:
            self._socket.send(message)
        except BlockingIOError:
            self._unsent.append(message)
            self._mailbox.watch(self._socket, self._ready, READABLE | WRITABLE)
        except OSError as error:
            self.hang_up(f"writing to it failed: {error.strerror}")

    def hang_up(self, why: str) -> None:
        """Makes the mailbox's owner call `end(why)`. May be called from any thread."""
        self._mailbox.post(lambda: self.end(why))

    def end(self, why: str) -> None:
        """Closes the socket and reports `why` to `on_lost`. Does nothing if the socket is closed already."""
        if not self._open:
            return
        self._open = False
        self._mailbox.unwatch(self._socket)
        self._socket.close()
        self._unsent.clear()
        on_lost = self._on_lost
        self._on_message = self._on_lost = _ignore  # releases the connection, and its segment with it
        on_lost(why)

    def _ready(self, mask: int) -> None:
        try:
            if mask & WRITABLE:
                self._send_rest()
            if not mask & READABLE:
                return
            if message := self._socket.recv(MESSAGE_BYTES):
                self._on_message(message)
            else:
                self.end("the peer's process ended or closed it")
        except BlockingIOError:
            return
        except OSError as error:
            self.end(f"reading from it failed: {error.strerror}")

    def _send_rest(self) -> None:
        while self._unsent:
            self._socket.send(self._unsent[0])
            self._unsent.popleft()
        self._mailbox.watch(self._socket, self._ready)


def _ignore(_: object) -> None:
    """Does nothing."""
