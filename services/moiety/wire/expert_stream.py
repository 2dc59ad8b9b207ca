"""The router's end of a Forward stream: many calls in flight on one long-lived stream, each answered by a callback."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from moiety.core import ExpertSet
from moiety.errors import InvalidRequest, PeerLost
from moiety.wire import codec, status
from moiety.wire.channels import channel
from moiety.wire.experts_pb2 import DescribeRequest, DescribeResponse, ForwardReply, ForwardRequest

_SERVICE = "/moiety.v1.Experts"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answered call: the header without its payload, and the payload as a view of the received frame."""

    header: ForwardReply
    payload: memoryview


Answer = Callable[[Reply | PeerLost], None]


class ExpertStream:
    """Opened and read on one asyncio loop; `send` may be called from any thread.

    Every send is answered exactly once, on the loop: by its reply, or by PeerLost when the stream breaks.
    """

    def __init__(self, address: str, description: DescribeResponse, held: ExpertSet, grpc_channel: grpc.aio.Channel):
        self.address = address
        self.description, self.held = description, held  # as the replica told last
        self._channel = grpc_channel
        self._loop = asyncio.get_running_loop()
        self._call = grpc_channel.stream_stream(f"{_SERVICE}/Forward")()  # no serialisers: raw frames
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._answers: dict[tuple[int, int], Answer] = {}
        self._lost: PeerLost | None = None
        self.closed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    @classmethod
    async def open(cls, address: str, timeout_s: float) -> ExpertStream:
        """Connects and shakes hands within `timeout_s`. Raises PeerLost, what Describe answered, or InvalidRequest where
        what it says it holds cannot be read.
        """
        grpc_channel = channel(address)
        try:
            return cls(address, *await _describe(grpc_channel, timeout_s), grpc_channel)
        except BaseException:
            await grpc_channel.close()
            raise

    async def describe(self, timeout_s: float) -> DescribeResponse:
        """Asks again what the replica holds, after it said NOT_HELD. Raises as `open` does."""
        self.description, self.held = await _describe(self._channel, timeout_s)
        return self.description

    def send(self, header: ForwardRequest, payload: codec.Rows, answer: Answer) -> None:
        """Sends one call. `payload` is copied into the frame before this returns."""
        frame = codec.encode(header, payload)
        self._loop.call_soon_threadsafe(self._enqueue, (header.call_id, header.attempt), frame, answer)

    async def close(self) -> None:
        """Breaks the stream; whatever is unanswered gets PeerLost."""
        self._break(PeerLost(f"the stream to {self.address} was closed here"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    def _enqueue(self, key: tuple[int, int], frame: bytes, answer: Answer) -> None:
        if self._lost is not None:
            answer(self._lost)
            return
        self._answers[key] = answer
        self._frames.put_nowait(frame)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._frames.get())
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(self._loss(error))

    async def _read(self) -> None:
        try:
            while (frame := await self._call.read()) is not grpc.aio.EOF:
                header, payload = codec.decode(ForwardReply, frame)
                if answer := self._answers.pop((header.call_id, header.attempt), None):
                    answer(Reply(header, payload))
            self._break(PeerLost(f"{self.address} ended the stream"))
        except (grpc.RpcError, InvalidRequest, asyncio.InvalidStateError) as error:
            self._break(self._loss(error))

    def _loss(self, error: BaseException) -> PeerLost:
        told = status.error_of(error) if isinstance(error, grpc.RpcError) else error
        return PeerLost(f"the stream to {self.address} broke: {told}")

    def _break(self, loss: PeerLost) -> None:
        if self._lost is not None:
            return
        self._lost = loss
        self._call.cancel()
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer(loss)
        self.closed.set()


async def _describe(grpc_channel: grpc.aio.Channel, timeout_s: float) -> tuple[DescribeResponse, ExpertSet]:
    call = grpc_channel.unary_unary(
        f"{_SERVICE}/Describe",
        request_serializer=DescribeRequest.SerializeToString,
        response_deserializer=DescribeResponse.FromString,
    )
    try:
        description = await call(DescribeRequest(), timeout=timeout_s)
    except grpc.RpcError as error:
        raise status.error_of(error) from None
    try:
        return description, ExpertSet.parse(description.held)
    except ValueError as error:
        raise InvalidRequest("held", description.held, f"a set of experts: {error}") from None
