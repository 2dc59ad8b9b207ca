"""One router's gRPC stream of calls: how much memory it may occupy, and what happens when the router does not read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from math import inf

import grpc

from moiety.core.supervise import spawn
from moiety.wire.channels import MAX_MESSAGE_BYTES

# Calls and replies of one router in memory. A call of the largest size is read alone; smaller ones overlap.
WINDOW_BYTES = MAX_MESSAGE_BYTES // 2
UNREAD_S = 10.0  # a router that does not take a reply within this time is given up: 32 MiB at 27 Mbit/s


class CallStream:
    """Reads calls and writes replies concurrently, on one event loop.

    A call occupies the window, with its frame and its reply's rows, from when it is read until its reply is written. While
    the window is full, no call is read. HTTP/2's flow control then stops this router, and no other one.
    """

    def __init__(self, accept: Callable[[bytes, CallStream], None]):
        """`accept(frame, stream)` takes one frame. If it is a call, it uses `stream.begin`."""
        self._accept = accept
        self._loop = asyncio.get_running_loop()
        # (reply, bytes that its call occupies), bounded by the window
        self._replies: deque[tuple[bytes, int]] = deque()
        self._occupied = self._open = 0  # bytes; calls whose reply is not written yet
        self._reading, self._given_up = True, False
        self._write_began = inf  # the loop's time when the current write began; inf: none is in progress
        self._alarm: asyncio.TimerHandle  # set by `_watch`
        self._to_write, self._written = asyncio.Event(), asyncio.Event()

    def begin(self, size: int) -> Callable[[bytes], None]:
        """Counts a call of `size` bytes, reply included. Returns the function that sends its reply, once, from any thread."""
        self._occupied += size
        self._open += 1

        def reply(frame: bytes) -> None:
            self._loop.call_soon_threadsafe(self._enqueue, frame, size)

        return reply

    async def serve(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serves until the router closes its half and every reply is written.

        A router that does not take a reply is given up: its other replies are freed, and its stream ends with
        RESOURCE_EXHAUSTED as soon as it has taken that one. gRPC cannot end a stream in the middle of a message.
        """
        reader = spawn("expert calls", self._read(frames))
        self._watch(reader)
        try:
            while await self._next():
                frame, size = self._replies.popleft()
                self._write_began = self._loop.time()
                await context.write(frame)
                self._write_began = inf
                self._occupied -= size
                self._open -= 1
                self._written.set()
                if self._given_up:
                    detail = f"a reply was not read for {UNREAD_S:g} s; {self._open} further calls were given up"
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, detail)
        finally:
            reader.cancel()
            self._alarm.cancel()

    async def _read(self, frames: AsyncIterator[bytes]) -> None:
        try:
            async for frame in frames:
                self._accept(frame, self)
                while self._occupied >= WINDOW_BYTES:
                    self._written.clear()
                    await self._written.wait()
        finally:
            self._reading = False
            self._to_write.set()

    async def _next(self) -> bool:
        """Waits for a reply to write. Returns False if no further one will come."""
        while not self._replies:
            if not (self._reading or self._open):
                return False
            self._to_write.clear()
            await self._to_write.wait()
        return True

    def _enqueue(self, frame: bytes, size: int) -> None:
        if not self._given_up:
            self._replies.append((frame, size))
            self._to_write.set()

    def _watch(self, reader: asyncio.Task[None]) -> None:
        """Gives the router up once the current write is late, else looks again soon: cheaper than a timer for each write."""
        if self._loop.time() - self._write_began < UNREAD_S:
            self._alarm = self._loop.call_later(UNREAD_S / 10, self._watch, reader)
            return
        self._given_up = True
        self._replies.clear()
        reader.cancel()
