"""The interface between the hop and a transport: the hop writes its calls into buffers that the transport provides.

    buffer = connection.acquire(header, rows=R, row_bytes=W, reply_rows=A)
    copy_rows(source, buffer.rows, chosen=tokens)  # the only copy that the interface requires
    buffer.send(answer)

gRPC copies the buffer into a frame; through shared memory the replica reads the buffer itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moiety.errors import PeerLost
from moiety.internal.v1.experts_pb2 import ForwardRequest, ForwardResponse
from moiety.wire.rows import RowBuffer


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to a call: the header without its payload, and the payload in the transport's memory.

    The transport may reuse that memory: the payload is valid until the `Answer` callback that received the reply returns.
    """

    header: ForwardResponse
    payload: memoryview


Answer = Callable[[Reply | PeerLost], None]
MOST_UNASKED = 1000  # answers that fit no open call, after which a connection is closed: reading them takes our time


class Buffer(Protocol):
    """Memory for the rows of one call. The thread that acquired it fills and sends it."""

    @property
    def rows(self) -> RowBuffer:
        """The R rows to fill."""
        ...

    def send(self, answer: Answer) -> None:
        """Sends the call without blocking. The mailbox's thread calls `answer` once, after `send` has returned."""
        ...


class Connection(Protocol):
    """Carries the calls of one router to one replica: many in flight, answered in any order.

    An answer that fits no open call is dropped and reported to `on_unasked`, on the mailbox's thread. After MOST_UNASKED
    of them the connection closes.

    Created and closed on an asyncio loop. Calls are sent and answered on the thread that owns the connection's mailbox
    (`mailbox.py`).
    """

    closed: asyncio.Event  # set once the peer is lost or `close` was called

    def acquire(self, header: ForwardRequest, *, rows: int, row_bytes: int, reply_rows: int) -> Buffer:
        """Returns a buffer for a call of `rows` rows and a reply of at most `reply_rows` rows, `row_bytes` bytes each.

        `header` must be complete, because the transport may serialise it here. Raises ResourceExhausted if
        unanswered calls leave too little memory. A lost connection still returns a buffer; its call is answered with PeerLost.
        """
        ...

    def cancel(self, call_id: int, attempt: int) -> None:
        """Asks the replica to drop a call that it has not begun. The call is still answered once. Mailbox's thread only."""
        ...

    async def close(self) -> None:
        """Closes the connection; unanswered calls get PeerLost."""
        ...
