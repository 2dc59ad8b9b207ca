"""The gateway's end of its stream to a router."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from math import inf

import grpc

from moiety.core.supervise import spawn
from moiety.errors import DeadlineExceeded, MoietyError, PeerLost
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.wire import status
from moiety.wire.deadline import Deadline
from moiety.wire.event_stream.call_server import BEAT_S
from moiety.wire.event_stream.inbox import MOST_UNREAD, MOST_UNREAD_BY_ALL, Inbox, Open, fullest

LONGEST_MS = (1 << 32) - 1  # largest value of timeout_ms: 49 days
LATE_S = 1.0  # seconds after its deadline that a call still waits for the router's own answer
MOST_MISSED = 6  # beats that a gateway waits for before it breaks the stream


class StreamBroken(PeerLost):
    """The stream that carries a call broke. Its router may live."""


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
        self._missed = 0  # beats since the last message
        self._call = stub.GenerateTokens()
        self._tasks = [
            spawn("calls to a router", self._write()),
            spawn("events of a router", self._read()),
            spawn("silence of a router", self._watch()),
        ]

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
                self._missed = 0
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

    async def _watch(self) -> None:
        while self._missed < MOST_MISSED:
            await asyncio.sleep(BEAT_S)  # counts turns of the loop, not time: this process may have been stopped
            self._missed = self._missed + 1 if self.inboxes else 0
        self._break(f"it was silent for {MOST_MISSED * BEAT_S:g} s")

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
