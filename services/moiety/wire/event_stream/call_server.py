"""The router's end of a gateway's stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from moiety.core.supervise import spawn
from moiety.core.visible import visible
from moiety.errors import InvalidRequest, MoietyError, ResourceExhausted
from moiety.internal.v1 import engine_pb2
from moiety.wire import status

MESSAGE_EVENTS = 256  # most events in one message, so that no message exceeds the channel's size limit
MOST_UNSENT = 1 << 16  # events that wait for a gateway that has stopped to read: up to 2 KB each
MOST_BEHIND = 4 * MOST_UNSENT  # events that wait for a gateway that reads, but more slowly than the router computes
STOPPED_S = 1.0  # a gateway that has taken no message for so long has stopped to read
CUT_S = 1.0  # seconds that the end of an RPC may wait for a peer that does not read
BEAT_S = 0.5  # a router that has nothing to send sends an empty message so often, while a call is open

Event = Callable[[], engine_pb2.EngineEvent]  # builds the event on the loop, to spare the engine's thread the work
SendEvent = Callable[[Event], None]
CallHandler = Callable[[engine_pb2.GenerateTokensRequest, SendEvent], Coroutine[Any, Any, None]]


class CallServer:
    """The router's end of one gateway's stream.

    `handle(call, send_event)` serves one call. It passes each event to `send_event`, from any thread, and returns after the
    last one. It is cancelled when the gateway cancels the call or the stream breaks. An exception that it raises is sent to
    the gateway and ends the call.
    """

    def __init__(self, handle: CallHandler):
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._outbox: deque[tuple[int, Event]] = deque()
        self._woken, self._more, self._sent = False, asyncio.Event(), asyncio.Event()
        self._sent.set()
        self._ended = self._beating = False
        self._writing: asyncio.Task[None] | None = None
        self._unsent = 0  # events that waited when the stream was cut off
        self._wrote = 0.0  # when the gateway took the last message, or the first event after a pause came

    @property
    def idle(self) -> bool:
        """Whether no call is open and every event has been sent."""
        return not (self._calls or self._outbox) and self._sent.is_set()

    async def serve(
        self,
        calls: AsyncIterator[engine_pb2.GenerateTokensRequest],
        context: grpc.aio.ServicerContext[engine_pb2.GenerateTokensRequest, engine_pb2.GenerateTokensResponse],
    ) -> None:
        """Serves calls until the gateway has closed its half of the stream and every call has ended.

        Ends the stream with ResourceExhausted if too many events wait for the gateway to read. gRPC cancels this coroutine
        when the stream breaks. The open calls are cancelled in both cases.
        """
        await context.send_initial_metadata(())  # an RPC without it cannot be ended while a message waits
        reading = spawn("calls of a gateway", self._read(calls))
        writing = self._writing = spawn("events for a gateway", self._write(context))
        beating = spawn("beats for a gateway", self._beat())
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            if not self._ended:
                return
            await end_unread(context, ResourceExhausted(f"{self._unsent} events wait for this gateway to read", CUT_S))
        finally:
            self._ended = True
            self._outbox.clear()
            self._sent.set()
            for task in (reading, writing, beating, *self._calls.values()):
                task.cancel()

    async def _read(self, calls: AsyncIterator[engine_pb2.GenerateTokensRequest]) -> None:
        with suppress(grpc.aio.BaseError):  # the stream broke
            async for call in calls:
                open_call = self._calls.get(call.call_id)
                if not call.HasField("request"):
                    if open_call is not None:
                        open_call.cancel()
                elif open_call is None:
                    self._calls[call.call_id] = spawn("call", self._run(call))
                else:
                    repeated = InvalidRequest("call_id", call.call_id, "an id of no open call of this stream")
                    self._send_error(call.call_id, repeated)
        while self._calls:
            await asyncio.wait(self._calls.values())
        await self._sent.wait()

    async def _run(self, call: engine_pb2.GenerateTokensRequest) -> None:
        try:
            await self._handle(call, partial(self._send, call.call_id))
        except Exception as error:
            self._send_error(call.call_id, visible(error, call.request.request_id))
        finally:
            if self._calls.get(call.call_id) is asyncio.current_task():
                del self._calls[call.call_id]

    def _send(self, call_id: int, event: Event) -> None:
        """Queues an event. May be called from any thread."""
        if self._ended:
            return
        self._outbox.append((call_id, event))
        if not self._woken:  # one wake-up of the loop for all events that arrive before it runs
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    def _send_error(self, call_id: int, error: MoietyError) -> None:
        message = status.to_message(error)
        self._send(call_id, lambda: engine_pb2.EngineEvent(error=message))

    def _wake(self) -> None:
        self._woken = False
        now = self._loop.time()
        if self._sent.is_set():
            self._wrote = now
        self._sent.clear()
        self._more.set()
        stopped = now - self._wrote > STOPPED_S
        if len(self._outbox) > (MOST_UNSENT if stopped else MOST_BEHIND) and self._writing is not None:
            self._ended, self._unsent = True, len(self._outbox)
            self._writing.cancel()

    async def _write(
        self, context: grpc.aio.ServicerContext[engine_pb2.GenerateTokensRequest, engine_pb2.GenerateTokensResponse]
    ) -> None:
        with suppress(grpc.aio.BaseError):  # the stream broke
            while await self._more.wait():
                self._more.clear()
                while self._outbox or self._beating:
                    self._beating = False
                    message = engine_pb2.GenerateTokensResponse()
                    while self._outbox and len(message.events) < MESSAGE_EVENTS:
                        message.events.append(self._made(*self._outbox.popleft()))
                    await context.write(message)
                    self._wrote = self._loop.time()
                self._sent.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            if self._calls and self._sent.is_set():
                self._beating = True
                self._more.set()

    def _made(self, call_id: int, make: Event) -> engine_pb2.EngineEvent:
        """Returns the event. If it cannot be made, its call ends; otherwise no call of the stream would get another event."""
        try:
            event = make()
        except Exception as error:
            event = engine_pb2.EngineEvent(error=status.to_message(visible(error)))
            if (open_call := self._calls.get(call_id)) is not None:
                open_call.cancel()
        event.call_id = call_id
        return event


async def end_unread(context: grpc.aio.ServicerContext, error: MoietyError) -> None:
    """Ends an RPC whose peer does not read, and whose initial metadata has been sent. The peer finds `error` if it reads on."""
    # After the timeout gRPC keeps the message that waits, and the status, until the peer reads on or leaves.
    with suppress(TimeoutError):
        async with asyncio.timeout(CUT_S):
            await status.abort(context, error)
