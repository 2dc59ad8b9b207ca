"""The seam between the hop and what carries it: calls are written into buffers that the transport hands out.

    buffer = connection.acquire(header, rows=R, row_bytes=W, reply_rows=A)
    source.take(tokens, out=buffer.rows)       # the only copy that the seam asks for
    buffer.send(answer)

gRPC (over TCP or a unix socket) copies the buffer into a frame; in shared memory the buffer is where the replica reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from moiety.errors import PeerLost
from moiety.internal.v1.experts_pb2 import ForwardRequest, ForwardResponse
from moiety.wire.codec import Rows


@dataclass(frozen=True, slots=True)
class Reply:
    """An answered call: the header without its payload, and the payload where it lies.

    The payload may be memory that the transport uses again: it is valid until the `Answer` that got it returns.
    """

    header: ForwardResponse
    payload: memoryview


Answer = Callable[[Reply | PeerLost], None]


class Buffer(Protocol):
    """Room for the rows of one call; to be filled and sent by the thread that acquired it."""

    @property
    def rows(self) -> Rows:
        """[R] opaque rows, to be written."""
        ...

    def send(self, answer: Answer) -> None:
        """Sends the call. Never blocks. `answer` is called once, on the mailbox's thread and never from in here."""
        ...


class Connection(Protocol):
    """The calls of one router to one replica: many in flight, answered in any order.

    Made and closed on an asyncio loop, used by the thread that owns the mailbox it was made with.
    """

    closed: asyncio.Event  # set once the peer is lost, or `close` was called

    def acquire(self, header: ForwardRequest, *, rows: int, row_bytes: int, reply_rows: int) -> Buffer:
        """Room for a call of `rows` rows, to be answered with at most `reply_rows` rows; `header` must be complete.

        Raises ResourceExhausted where so much is unanswered that there is none. A lost connection still gives room:
        what is sent on it is answered PeerLost.
        """
        ...

    async def close(self) -> None:
        """Ends it; whatever is unanswered gets PeerLost."""
        ...
