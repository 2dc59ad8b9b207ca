"""The events that a gateway has received for one request and its client has not taken, and how many there may be."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from moiety.errors import MoietyError, ResourceExhausted
from moiety.internal.v1 import engine_pb2
from moiety.wire import status

MOST_UNREAD = 1 << 12  # events of one call
MOST_UNREAD_BY_ALL = 1 << 16  # events of all calls of one stream: up to 2 KB each


@dataclass(slots=True)
class Open:
    """What one router has to do for this gateway, and what it has done that no client has taken yet."""

    calls: int = 0
    choices: int = 0  # of these calls
    unread: int = 0  # events


class Inbox:
    """The received events of one call. It counts in `Open` until the router has ended the call, read or not."""

    def __init__(self, choices: int, counts: Open):
        self.unfinished = choices  # choices that the router has not ended
        self._counts = counts
        self._events: deque[engine_pb2.EngineEvent | MoietyError] = deque()
        self._some = asyncio.Event()
        counts.calls += 1
        counts.choices += choices

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: engine_pb2.EngineEvent) -> None:
        """Adds an event of the router, unless the call has ended."""
        if not self.unfinished:
            return
        if event.HasField("error"):
            self.fail(status.error_of_message(event.error))
            return
        if event.finish_reason:
            self.unfinished -= 1
            self._counts.choices -= 1
            self._counts.calls -= not self.unfinished
        self._add(event)

    def fail(self, error: MoietyError) -> None:
        """Ends the call with `error`, after the events that it has."""
        self._end()
        self._add(error)

    def cut(self) -> None:
        """Ends the call because its client does not read, and drops the events."""
        unread = len(self)
        self.close()
        self._add(ResourceExhausted(f"the client has not read, and {unread} events wait for it", 1.0))

    def close(self) -> None:
        """Drops the events; the call counts no longer."""
        self._end()
        self._counts.unread -= len(self._events)
        self._events.clear()

    async def get(self) -> engine_pb2.EngineEvent:
        """Returns the next event. Raises the error that ended the call."""
        while not self._events:
            self._some.clear()
            await self._some.wait()
        self._counts.unread -= 1
        if isinstance(event := self._events.popleft(), MoietyError):
            raise event
        return event

    def _add(self, event: engine_pb2.EngineEvent | MoietyError) -> None:
        self._events.append(event)
        self._counts.unread += 1
        self._some.set()

    def _end(self) -> None:
        if self.unfinished:
            self._counts.choices -= self.unfinished
            self._counts.calls -= 1
            self.unfinished = 0


def fullest(inboxes: Mapping[int, Inbox], bound: int) -> int | None:
    """Returns the call with the most unread events if all calls in `inboxes` have more than `bound` of them, else None."""
    if sum(map(len, inboxes.values())) <= bound:
        return None  # what is left of an earlier stream, which broke, is no fault of these calls
    return max(inboxes, key=lambda call_id: len(inboxes[call_id]))
