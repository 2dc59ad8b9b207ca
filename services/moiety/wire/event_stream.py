"""Both ends of the stream between a gateway and a router: calls are sent one by one, and their events in batches.

Each message costs the router about 0.1 ms and the gateway as much, whatever its size. The router's engine loses that time,
because it is a thread of the same Python interpreter. So a router sends the events of a step together, at most
MESSAGE_EVENTS in one message.

Neither end collects without bound for a reader that is too slow. A gateway that does not read loses its stream; a client
that does not read loses its request.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

import grpc

from moiety.core.supervise import spawn
from moiety.errors import DeadlineExceeded, InvalidRequest, MoietyError, PeerLost, ResourceExhausted
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.wire import status
from moiety.wire.deadline import Deadline
from moiety.wire.inbox import MOST_UNREAD, MOST_UNREAD_BY_ALL, Inbox, Open, fullest

MESSAGE_EVENTS = 256  # most events in one message, so that no message exceeds the channel's size limit
LONGEST_MS = (1 << 32) - 1  # largest value of timeout_ms: 49 days
LATE_S = 1.0  # seconds after its deadline that a call still waits for the router's own answer
MOST_UNSENT = 1 << 16  # events that wait for a gateway that has stopped to read: up to 2 KB each
MOST_BEHIND = 4 * MOST_UNSENT  # events that wait for a gateway that reads, but more slowly than the router computes
STOPPED_S = 1.0  # a gateway that has taken no message for so long has stopped to read
CUT_S = 1.0  # seconds that the end of an RPC may wait for a peer that does not read


class StreamBroken(PeerLost):
    """The stream that carries a call broke. Its router may live."""


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
        self._ended = False
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
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            if not self._ended:
                return
            await end_unread(context, ResourceExhausted(f"{self._unsent} events wait for this gateway to read", CUT_S))
        finally:
            self._ended = True
            self._outbox.clear()
            self._sent.set()
            for task in (reading, writing, *self._calls.values()):
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
            self._send_error(call.call_id, status.ours(error, call.request.request_id))
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
                while self._outbox:
                    message = engine_pb2.GenerateTokensResponse()
                    while self._outbox and len(message.events) < MESSAGE_EVENTS:
                        message.events.append(self._made(*self._outbox.popleft()))
                    await context.write(message)
                    self._wrote = self._loop.time()
                self._sent.set()

    def _made(self, call_id: int, make: Event) -> engine_pb2.EngineEvent:
        """Returns the event. If it cannot be made, its call ends; otherwise no call of the stream would get another event."""
        try:
            event = make()
        except Exception as error:
            event = engine_pb2.EngineEvent(error=status.to_message(status.ours(error)))
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


class CallClient:
    """The gateway's end of its stream to one router. `generate` opens the stream if none is open."""

    def __init__(self, stub: engine_pb2_grpc.EngineServiceStub, peer: str):
        self._stub, self._peer = stub, peer
        self._ids = itertools.count(1)
        self._stream: _Stream | None = None
        self.open = Open()

    async def generate(
        self, request: engine_pb2.EngineRequest, deadline: Deadline, traceparent: str
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """Yields the events of one request until all its choices have ended; closing the generator cancels the request.

        Raises the error that the router sent, StreamBroken if the stream breaks, DeadlineExceeded if the router has not ended
        the request LATE_S seconds after the deadline, and ResourceExhausted if too many events have not been taken.
        """
        if self._stream is None or self._stream.broken:
            self._stream = _Stream(self._stub, self._peer, self.open)
        stream, call_id, unfinished = self._stream, next(self._ids), max(request.sampling.n, 1)
        inbox = stream.inboxes[call_id] = Inbox(unfinished, self.open)
        call = engine_pb2.GenerateTokensRequest(call_id=call_id, request=request, traceparent=traceparent)
        alarm = None
        if (left := deadline.left()) < inf:
            call.timeout_ms = min(max(1, int(left * 1000)), LONGEST_MS)
            late = DeadlineExceeded(f"{self._peer} did not answer by the deadline")
            alarm = asyncio.get_running_loop().call_later(left + LATE_S, stream.give_up, call_id, late)
        stream.calls.put_nowait(call)
        try:
            while unfinished:
                event = await inbox.get()
                unfinished -= bool(event.finish_reason)
                yield event
        finally:
            if alarm is not None:
                alarm.cancel()
            stream.end(call_id)

    async def close(self) -> None:
        """Ends the stream; unanswered calls get StreamBroken. A later call opens another stream."""
        if self._stream is not None:
            await self._stream.close()


class _Stream:
    """One open gRPC stream to a router: its reader, its writer, and the received events of each of its calls."""

    def __init__(self, stub: engine_pb2_grpc.EngineServiceStub, peer: str, counts: Open):
        self.calls = asyncio.Queue[engine_pb2.GenerateTokensRequest]()
        self.inboxes: dict[int, Inbox] = {}
        self.broken = False
        self._peer, self._counts = peer, counts
        self._call = stub.GenerateTokens()
        self._tasks = [spawn("calls to a router", self._write()), spawn("events of a router", self._read())]

    async def close(self) -> None:
        self._break("closed by this side")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def give_up(self, call_id: int, error: MoietyError) -> None:
        """Ends a call with `error`, and cancels it at the router."""
        self._cancel(call_id)
        self.inboxes[call_id].fail(error)

    def end(self, call_id: int) -> None:
        """Forgets a call, which is cancelled at the router unless that has ended it."""
        self._cancel(call_id)
        self.inboxes.pop(call_id).close()

    def _cancel(self, call_id: int) -> None:
        if self.inboxes[call_id].unfinished:
            self.calls.put_nowait(engine_pb2.GenerateTokensRequest(call_id=call_id))

    async def _write(self) -> None:
        why = "its writer failed"
        try:
            while True:
                await self._call.write(await self.calls.get())
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            why = _reason(error)
        finally:
            self._break(why)

    async def _read(self) -> None:
        why = "its reader failed"
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                for event in message.events:
                    if (inbox := self.inboxes.get(event.call_id)) is not None:
                        inbox.put(event)
                        if len(inbox) > MOST_UNREAD:
                            self._cut(event.call_id)
                if self._counts.unread > MOST_UNREAD_BY_ALL and (call_id := fullest(self.inboxes, MOST_UNREAD_BY_ALL)):
                    self._cut(call_id)
            why = "ended by the peer"
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            why = _reason(error)
        finally:
            self._break(why)

    def _cut(self, call_id: int) -> None:
        self._cancel(call_id)
        self.inboxes[call_id].cut()

    def _break(self, why: str) -> None:
        if self.broken:
            return
        self.broken = True
        self._call.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for inbox in self.inboxes.values():
            inbox.fail(StreamBroken(f"the stream to {self._peer} broke: {why}"))


def _reason(error: BaseException) -> str:
    return str(status.error_of(error) if isinstance(error, grpc.RpcError) else error)
