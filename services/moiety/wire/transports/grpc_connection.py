"""The router's end of a Forward stream: many calls in flight on one long-lived gRPC stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grpc

from moiety.core.supervise import spawn
from moiety.errors import InvalidRequest, PeerLost
from moiety.internal.v1.experts_pb2 import ForwardRequest, ForwardResponse
from moiety.wire import codec, status
from moiety.wire.rows import RowBuffer
from moiety.wire.service_names import EXPERT_SERVICE
from moiety.wire.transports.connection import MOST_UNASKED, Answer, Reply
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

    def __init__(self, address: str, channel: grpc.aio.Channel, mailbox: Mailbox, on_unasked: Callable[[], None]):
        self.closed = asyncio.Event()
        self._address, self._mailbox = address, mailbox
        self._loop = asyncio.get_running_loop()
        self._call = channel.stream_stream(f"/{EXPERT_SERVICE}/Forward")()  # no serialisers: raw frames
        self._outbox: deque[tuple[tuple[int, int], bytes, Answer | None]] = deque()  # None: a cancellation
        self._more, self._woken = asyncio.Event(), False
        self._answers: dict[tuple[int, int], Answer] = {}
        self._on_unasked, self._unasked = on_unasked, 0
        self._lost: PeerLost | None = None
        self._tasks = [spawn("expert stream writer", self._write()), spawn("expert stream reader", self._read())]

    def acquire(self, header: ForwardRequest, *, rows: int, row_bytes: int, reply_rows: int) -> _Frame:
        return _Frame(self, header, RowBuffer.empty(rows, row_bytes))

    async def close(self) -> None:
        self._break(PeerLost(f"the stream to {self._address} was closed by this side"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cancel(self, call_id: int, attempt: int) -> None:
        frame = codec.encode(ForwardRequest(call_id=call_id, attempt=attempt, cancel=True))
        self.send((call_id, attempt), frame, None)

    def send(self, key: tuple[int, int], frame: bytes, answer: Answer | None) -> None:
        """Queues a frame of the call (call id, attempt) for the stream, from any thread."""
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
                    if answer is not None:
                        self._answers[key] = answer
                    await self._call.write(frame)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(self._loss(error))
        except Exception as error:
            self._break(self._loss(error))  # a bug here must not leave calls without an answer
            raise

    async def _read(self) -> None:
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                header, payload = codec.decode(ForwardResponse, frame)
                if answer := self._answers.pop((header.call_id, header.attempt), None):
                    self._mailbox.post(partial(answer, Reply(header, payload)))
                elif (unasked := self._unasked + 1) <= MOST_UNASKED:
                    self._unasked = unasked
                    self._mailbox.post(self._on_unasked)
                else:
                    self._break(PeerLost(f"{self._address} sent over {MOST_UNASKED} answers that fit no open call"))
                    return
            self._break(PeerLost(f"{self._address} ended the stream"))
        except (grpc.RpcError, InvalidRequest, asyncio.InvalidStateError) as error:
            self._break(self._loss(error))
        except Exception as error:
            self._break(self._loss(error))
            raise

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
        answers: list[Answer] = list(self._answers.values())
        self._answers = {}
        while self._outbox:
            if (unsent := self._outbox.popleft()[2]) is not None:
                answers.append(unsent)
        for answer in answers:
            self._mailbox.post(partial(answer, loss))
