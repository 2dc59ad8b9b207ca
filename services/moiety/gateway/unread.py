"""Ends requests whose clients do not read what is generated for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from moiety.errors import ResourceExhausted
from moiety.gateway.request import Delta

UNREAD_S = 20.0  # a client that has not read for so long loses its request


class Unread(ResourceExhausted):
    """The client does not read what was generated for it."""


class Readers:
    """Passes deltas on to the clients of one API."""

    def __init__(self) -> None:
        self._writing: dict[asyncio.Timeout, float] = {}  # since when a delta waits for its client
        self._next_look: asyncio.TimerHandle | None = None

    async def send(self, deltas: AsyncGenerator[Delta, None], write: Callable[[Delta], Awaitable[object]]) -> None:
        """Writes all deltas to one client. Raises Unread if a write takes longer than UNREAD_S."""
        loop = asyncio.get_running_loop()
        async with aclosing(deltas):
            try:
                async with asyncio.timeout(None) as patience:
                    async for delta in deltas:
                        self._writing[patience] = loop.time()
                        if self._next_look is None:
                            self._next_look = loop.call_later(UNREAD_S / 4, self._end_patience)
                        await write(delta)
                        self._writing.pop(patience, None)
            except TimeoutError:
                if not patience.expired():
                    raise
                await deltas.athrow(Unread(f"the client has not read for {UNREAD_S:g} s", UNREAD_S))
            finally:
                # Before `deltas` is closed, which takes time: a timeout that has ended cannot be rescheduled.
                self._writing.pop(patience, None)

    def _end_patience(self) -> None:
        """Ends the requests whose clients have not read for UNREAD_S. One timer for all: one for each token costs 5 µs."""
        loop = asyncio.get_running_loop()
        now, self._next_look = loop.time(), None
        for patience, since in [*self._writing.items()]:
            if since <= now - UNREAD_S:
                del self._writing[patience]  # once: a timeout that ends cannot be rescheduled again
                patience.reschedule(now)
        if self._writing:
            self._next_look = loop.call_later(UNREAD_S / 4, self._end_patience)
