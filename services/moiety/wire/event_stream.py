"""Both ends of the stream between a gateway and a router: calls are sent one by one, and their events in batches.

Each message costs the router about 0.1 ms and the gateway as much, whatever its size. The router's engine loses that time,
because it is a thread of the same Python interpreter. So a router sends the events of a step together, at most
MESSAGE_EVENTS in one message.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from math import inf
from typing import Any

import grpc

from moiety.errors import DeadlineExceeded, MoietyError, PeerLost
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.wire import status
from moiety.wire.deadline import Deadline

MESSAGE_EVENTS = 256  # most events in one message, so that no message exceeds the channel's size limit
LONGEST_MS = (1 << 32) - 1  # largest value of timeout_ms: 49 days
LATE_S = 1.0  # seconds after its deadline that a call still waits for the router's own answer

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

        gRPC cancels this coroutine when the stream breaks; the open calls are then cancelled too.
        """
        writer = asyncio.create_task(self._write(context))
        try:
            async for call in calls:
                if call.HasField("request"):
                    self._begin(call)
                elif (open_call := self._calls.get(call.call_id)) is not None:
                    open_call.cancel()
            while self._calls:
                await asyncio.wait(self._calls.values())
            await self._sent.wait()
        finally:
            for task in self._calls.values():
                task.cancel()
            writer.cancel()

    def _begin(self, call: engine_pb2.GenerateTokensRequest) -> None:
        def send_event(event: Event) -> None:
            self._outbox.append((call.call_id, event))
            if not self._woken:  # one wake-up of the loop for all events that arrive before it runs
                self._woken = True
                self._loop.call_soon_threadsafe(self._wake)

        async def run() -> None:
            try:
                await self._handle(call, send_event)
            except Exception as error:
                message = status.to_message(error)
                send_event(lambda: engine_pb2.EngineEvent(error=message))
            finally:
                if self._calls.get(call.call_id) is asyncio.current_task():
                    del self._calls[call.call_id]

        self._calls[call.call_id] = asyncio.create_task(run())

    def _wake(self) -> None:
        self._woken = False
        self._sent.clear()
        self._more.set()

    async def _write(
        self, context: grpc.aio.ServicerContext[engine_pb2.GenerateTokensRequest, engine_pb2.GenerateTokensResponse]
    ) -> None:
        while await self._more.wait():
            self._more.clear()
            while self._outbox:
                message = engine_pb2.GenerateTokensResponse()
                while self._outbox and len(message.events) < MESSAGE_EVENTS:
                    call_id, make = self._outbox.popleft()
                    event = make()
                    event.call_id = call_id
                    message.events.append(event)
                await context.write(message)
            self._sent.set()


class CallClient:
    """The gateway's end of its stream to one router. `generate` opens the stream if none is open."""

    def __init__(self, stub: engine_pb2_grpc.EngineServiceStub, peer: str):
        self._stub, self._peer = stub, peer
        self._ids = itertools.count(1)
        self._stream: _Stream | None = None

    async def generate(
        self, request: engine_pb2.EngineRequest, deadline: Deadline, traceparent: str
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """Yields the events of one request until all its choices have ended; closing the generator cancels the request.

        Raises the error that the router sent, PeerLost if the stream breaks, and DeadlineExceeded if the router has not
        ended the request LATE_S seconds after the deadline.
        """
        if self._stream is None or self._stream.broken:
            self._stream = _Stream(self._stub, self._peer)
        stream, call_id, inbox = self._stream, next(self._ids), asyncio.Queue[engine_pb2.EngineEvent | MoietyError]()
        stream.inboxes[call_id] = inbox
        call = engine_pb2.GenerateTokensRequest(call_id=call_id, request=request, traceparent=traceparent)
        alarm = None
        if (left := deadline.left()) < inf:
            call.timeout_ms = min(max(1, int(left * 1000)), LONGEST_MS)
            late = DeadlineExceeded(f"{self._peer} did not answer by the deadline")
            alarm = asyncio.get_running_loop().call_later(left + LATE_S, inbox.put_nowait, late)
        stream.calls.put_nowait(call)
        unfinished = max(request.sampling.n, 1)
        try:
            while unfinished:
                event = await inbox.get()
                if isinstance(event, MoietyError):
                    raise event
                if event.HasField("error"):
                    unfinished = 0
                    raise status.error_of_message(event.error)
                unfinished -= bool(event.finish_reason)
                yield event
        finally:
            if alarm is not None:
                alarm.cancel()
            del stream.inboxes[call_id]
            if unfinished:
                stream.calls.put_nowait(engine_pb2.GenerateTokensRequest(call_id=call_id))

    @property
    def broken(self) -> bool:
        """Whether the stream broke, or was closed, since the last call began."""
        return self._stream is not None and self._stream.broken

    async def close(self) -> None:
        """Ends the stream; unanswered calls get PeerLost. A later call opens another stream."""
        if self._stream is not None:
            await self._stream.close()


class _Stream:
    """One open gRPC stream to a router: its reader, its writer, and a queue of received events for each of its calls."""

    def __init__(self, stub: engine_pb2_grpc.EngineServiceStub, peer: str):
        self.calls = asyncio.Queue[engine_pb2.GenerateTokensRequest]()
        self.inboxes: dict[int, asyncio.Queue[engine_pb2.EngineEvent | MoietyError]] = {}
        self.broken = False
        self._peer = peer
        self._call = stub.GenerateTokens()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    async def close(self) -> None:
        self._break("closed by this side")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self.calls.get())
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(_reason(error))

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                for event in message.events:
                    if (inbox := self.inboxes.get(event.call_id)) is not None:
                        inbox.put_nowait(event)
            self._break("ended by the peer")
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(_reason(error))

    def _break(self, why: str) -> None:
        if self.broken:
            return
        self.broken = True
        self._call.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for inbox in self.inboxes.values():
            inbox.put_nowait(PeerLost(f"the stream to {self._peer} broke: {why}"))


def _reason(error: BaseException) -> str:
    return str(status.error_of(error) if isinstance(error, grpc.RpcError) else error)
