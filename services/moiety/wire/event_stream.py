"""Many requests on one stream, both ends: a gateway's calls go in one by one, and a router's events come out together.

A message costs a router and a gateway some 0.1 ms each, whatever is in it, and the router's share is taken from the
interpreter that its engine needs. So a step sends one, however many requests it brought tokens.
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

MESSAGE_EVENTS = 256  # that one message may hold, so that none grows beyond what a stream takes
LONGEST_MS = (1 << 32) - 1  # what the field holds: 49 days
LATE_S = 1.0  # how long after its deadline a call waits for its router to say so

Event = Callable[[], engine_pb2.EngineEvent]  # made on the loop: the thread that tells of it has better things to do
Tell = Callable[[Event], None]
Handle = Callable[[engine_pb2.GenerateTokensRequest, Tell], Coroutine[Any, Any, None]]


class CallServer:
    """A router's end of one gateway's stream.

    `handle(call, tell)` runs for as long as a call is open: it `tell`s its events, from any thread, and returns once all
    are told. It is cancelled when the gateway gives the call up or is lost; a MoietyError that it raises ends the call.
    """

    def __init__(self, handle: Handle):
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._outbox: deque[tuple[int, Event]] = deque()
        self._woken, self._more, self._sent = False, asyncio.Event(), asyncio.Event()
        self._sent.set()

    @property
    def idle(self) -> bool:
        """Whether no call is open and every event has gone out."""
        return not (self._calls or self._outbox) and self._sent.is_set()

    async def serve(
        self,
        calls: AsyncIterator[engine_pb2.GenerateTokensRequest],
        context: grpc.aio.ServicerContext[engine_pb2.GenerateTokensRequest, engine_pb2.GenerateTokensResponse],
    ) -> None:
        """Returns when the gateway has closed its half and all is answered; cancelled with the stream."""
        writer = asyncio.create_task(self._write(context))
        try:
            async for call in calls:
                if call.HasField("request"):
                    self._begin(call)
                elif (given_up := self._calls.get(call.call_id)) is not None:
                    given_up.cancel()
            while self._calls:
                await asyncio.wait(self._calls.values())
            await self._sent.wait()
        finally:
            for task in self._calls.values():
                task.cancel()
            writer.cancel()

    def _begin(self, call: engine_pb2.GenerateTokensRequest) -> None:
        def tell(event: Event) -> None:
            self._outbox.append((call.call_id, event))
            if not self._woken:  # one wake-up of the loop for all that is told before it runs
                self._woken = True
                self._loop.call_soon_threadsafe(self._wake)

        async def run() -> None:
            try:
                await self._handle(call, tell)
            except Exception as error:
                told = status.to_message(error)
                tell(lambda: engine_pb2.EngineEvent(error=told))
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
    """A gateway's end: opened with the first call, and anew with the next one after it broke."""

    def __init__(self, stub: engine_pb2_grpc.EngineServiceStub, peer: str):
        self._stub, self._peer = stub, peer
        self._ids = itertools.count(1)
        self._stream: _Stream | None = None

    async def generate(
        self, request: engine_pb2.EngineRequest, deadline: Deadline, traceparent: str
    ) -> AsyncGenerator[engine_pb2.EngineEvent, None]:
        """The events of one request, to the end of all its choices; leaving it earlier gives it up.

        Raises what the router answered, PeerLost where the stream breaks.
        """
        if self._stream is None or self._stream.broken:
            self._stream = _Stream(self._stub, self._peer)
        stream, call_id, inbox = self._stream, next(self._ids), asyncio.Queue[engine_pb2.EngineEvent | MoietyError]()
        stream.inboxes[call_id] = inbox
        call = engine_pb2.GenerateTokensRequest(call_id=call_id, request=request, traceparent=traceparent)
        alarm = None
        if (left := deadline.left()) < inf:
            call.timeout_ms = min(max(1, int(left * 1000)), LONGEST_MS)
            late = DeadlineExceeded(f"{self._peer} said nothing at the deadline")
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

    async def close(self) -> None:
        """Ends the stream; whatever is unanswered gets PeerLost."""
        if self._stream is not None:
            await self._stream.close()


class _Stream:
    """One stream, and who waits for what of it."""

    def __init__(self, stub: engine_pb2_grpc.EngineServiceStub, peer: str):
        self.calls = asyncio.Queue[engine_pb2.GenerateTokensRequest]()
        self.inboxes: dict[int, asyncio.Queue[engine_pb2.EngineEvent | MoietyError]] = {}
        self.broken = False
        self._peer = peer
        self._call = stub.GenerateTokens()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    async def close(self) -> None:
        self._break("it was closed here")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self.calls.get())
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(_words(error))

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                for event in message.events:
                    if (inbox := self.inboxes.get(event.call_id)) is not None:
                        inbox.put_nowait(event)
            self._break("it was ended there")
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(_words(error))

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


def _words(error: BaseException) -> str:
    return str(status.error_of(error) if isinstance(error, grpc.RpcError) else error)
