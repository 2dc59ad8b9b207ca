"""The router's end of a Forward stream: many calls in flight on one long-lived gRPC stream."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial

import grpc

from moiety.errors import InvalidRequest, PeerLost
from moiety.internal.v1.experts_pb2 import ForwardRequest, ForwardResponse
from moiety.wire import codec, status
from moiety.wire.rows import RowBuffer
from moiety.wire.service_names import EXPERT_SERVICE
from moiety.wire.transports.connection import Answer, Reply
from moiety.wire.transports.mailbox import Mailbox


@dataclass(frozen=True, slots=True)
class _Frame:
    connection: GrpcConnection
    header: ForwardRequest
    rows: RowBuffer

    def send(self, answer: Answer) -> None:
        self.connection.send((self.header.call_id, self.header.attempt), codec.encode(self.header, self.rows), answer)


class GrpcConnection:
    """A Connection over a gRPC channel. Its asyncio loop is the one that runs the constructor."""

    def __init__(self, address: str, channel: grpc.aio.Channel, mailbox: Mailbox):
        self.closed = asyncio.Event()
        self._address, self._mailbox = address, mailbox
        self._loop = asyncio.get_running_loop()
        self._call = channel.stream_stream(f"/{EXPERT_SERVICE}/Forward")()  # no serialisers: raw frames
        self._outbox: deque[tuple[tuple[int, int], bytes, Answer]] = deque()
        self._more, self._woken = asyncio.Event(), False
        self._answers: dict[tuple[int, int], Answer] = {}
        self._lost: PeerLost | None = None
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def acquire(self, header: ForwardRequest, *, rows: int, row_bytes: int, reply_rows: int) -> _Frame:
        return _Frame(self, header, RowBuffer.empty(rows, row_bytes))

    async def close(self) -> None:
        self._break(PeerLost(f"the stream to {self._address} was closed by this side"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def send(self, key: tuple[int, int], frame: bytes, answer: Answer) -> None:
        """Queues the frame of the call (call id, attempt) for the stream, from any thread."""
        self._outbox.append((key, frame, answer))
        if not self._woken:  # one wake-up of the loop for all frames that are queued before it runs
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._woken = False
        if self._lost is not None:
            self._fail(self._lost)
        self._more.set()

    async def _write(self) -> None:
        try:
            while await self._more.wait():
                self._more.clear()
                while self._outbox:
                    key, frame, answer = self._outbox.popleft()
                    self._answers[key] = answer
                    await self._call.write(frame)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(self._loss(error))

    async def _read(self) -> None:
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                header, payload = codec.decode(ForwardResponse, frame)
                if answer := self._answers.pop((header.call_id, header.attempt), None):
                    self._mailbox.post(partial(answer, Reply(header, payload)))
            self._break(PeerLost(f"{self._address} ended the stream"))
        except (grpc.RpcError, InvalidRequest, asyncio.InvalidStateError) as error:
            self._break(self._loss(error))

    def _loss(self, error: BaseException) -> PeerLost:
        cause = status.error_of(error) if isinstance(error, grpc.RpcError) else error
        return PeerLost(f"the stream to {self._address} broke: {cause}")

    def _break(self, loss: PeerLost) -> None:
        if self._lost is not None:
            return
        self._lost = loss
        self._call.cancel()
        self._fail(loss)
        self.closed.set()

    def _fail(self, loss: PeerLost) -> None:
        answers, self._answers = list(self._answers.values()), {}
        while self._outbox:
            answers.append(self._outbox.popleft()[2])
        for answer in answers:
            self._mailbox.post(partial(answer, loss))
