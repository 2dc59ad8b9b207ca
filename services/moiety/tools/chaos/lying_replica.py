"""An expert replica that lies: it registers beside the real holders of its experts, and answers each call in one wrong way.

The lies are on the wire: a reply under another id, with other rows, with other numbers, or no reply. A lie that is a plausible
number (finite rows that are merely wrong) is not among them: nothing but a second computation would find it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

import grpc
import numpy as np

from moiety.internal.v1 import experts_pb2
from moiety.internal.v1.experts_pb2 import ForwardRequest, ForwardResponse
from moiety.wire import codec
from moiety.wire.rows import RowBuffer
from moiety.wire.server import Server
from moiety.wire.service_names import EXPERT_SERVICE

HOST = "127.0.0.1"
ELEMENT_BYTES = 4  # of a float32: a system of a trial has such rows
FLOOD = 20_000  # replies that nobody asked for
BOMB = "0-30000:0-3000"  # a set of 90 million experts in 14 characters

Lie = Callable[[ForwardRequest, int], Iterator[bytes]]  # (call, elements per row) -> the frames of the answer


def _answer(call: ForwardRequest, output: np.ndarray, **fields: object) -> bytes:
    """Returns a frame that answers `call` with `output` [A, D], and with `fields` where they differ from an honest answer."""
    honest: dict[str, object] = {
        "call_id": call.call_id,
        "attempt": call.attempt,
        "outcome": experts_pb2.OUTCOME_OK,
        "rows": len(output),
        "activated_experts": 1,
        "batch_rows": len(output),
        "queue_ms": 0.1,
        "compute_ms": 0.1,
    }
    payload = RowBuffer.within(memoryview(output.astype("<f4").tobytes()), ELEMENT_BYTES * max(output.shape[1], 1))
    return codec.encode(ForwardResponse(**{**honest, **fields}), payload if output.size else None)  # type: ignore[arg-type]


def _filled(value: float, more: int = 0) -> Lie:
    """Rows of one number; `more` rows than were asked for."""

    def lie(call: ForwardRequest, width: int) -> Iterator[bytes]:
        yield _answer(call, np.full((max(_asked(call) + more, 0), width), value))

    return lie


def _refusal(outcome: int) -> Lie:
    def lie(call: ForwardRequest, _: int) -> Iterator[bytes]:
        yield _answer(call, np.empty((0, 1)), outcome=outcome, detail="refused by a lying replica")

    return lie


def _silence(_call: ForwardRequest, _width: int) -> Iterator[bytes]:
    yield from ()


def _next_id(call: ForwardRequest, width: int) -> Iterator[bytes]:
    yield _answer(call, np.full((_asked(call), width), np.nan), call_id=call.call_id + 1)


def _neighbours(call: ForwardRequest, width: int) -> Iterator[bytes]:
    """Every call id around the one that was asked."""
    for other in range(max(call.call_id - 3, 0), call.call_id + 4):
        yield _answer(call, np.full((_asked(call), width), np.nan), call_id=other)


def _without_rows(call: ForwardRequest, _: int) -> Iterator[bytes]:
    yield _answer(call, np.empty((0, 1)), rows=_asked(call))


def _huge(call: ForwardRequest, _: int) -> Iterator[bytes]:
    yield _answer(call, np.zeros((1000, 15_000)))


def _nan_times(call: ForwardRequest, width: int) -> Iterator[bytes]:
    nan = float("nan")
    yield _answer(call, np.full((_asked(call), width), np.nan), queue_ms=nan, compute_ms=nan, batch_rows=0)


def _noise(call: ForwardRequest, _: int) -> Iterator[bytes]:
    yield random.Random(call.call_id).randbytes(300)


def _flood(call: ForwardRequest, _: int) -> Iterator[bytes]:
    for number in range(FLOOD):
        yield ForwardResponse(call_id=10**9 + number, outcome=experts_pb2.OUTCOME_OK).SerializeToString()


def _asked(call: ForwardRequest) -> int:
    return len(call.experts) // 4


ANSWERS: Mapping[str, tuple[str, Lie]] = {
    "silent": ("never answers", _silence),
    "nan": ("answers NaN", _filled(float("nan"))),
    "inf": ("answers infinity", _filled(float("inf"))),
    "short": ("answers a row too few", _filled(0.0, -1)),
    "long": ("answers a row too many", _filled(0.0, 1)),
    "empty": ("answers OK without rows", _without_rows),
    "huge": ("answers 60 MB to a call of a few rows", _huge),
    "nextid": ("answers under the next call's id", _next_id),
    "ids": ("answers under the ids of all calls around", _neighbours),
    "times": ("answers NaN milliseconds", _nan_times),
    "noise": ("answers random bytes", _noise),
    "flood": (f"sends {FLOOD} answers that nobody asked for", _flood),
    "lacks": ("always answers that it does not hold the experts", _refusal(experts_pb2.OUTCOME_NOT_HELD)),
    "wrong": ("always answers that it is of another system", _refusal(experts_pb2.OUTCOME_WRONG_SYSTEM)),
    "full": ("always answers that it is overloaded", _refusal(experts_pb2.OUTCOME_OVERLOADED)),
    "fails": ("always answers that it failed", _refusal(experts_pb2.OUTCOME_FAILED)),
    "unknown": ("answers an unknown outcome", _refusal(99)),
}
# Lies before a call: in the description, or of the TCP server.
DESCRIPTIONS: Mapping[str, str] = {
    "mute": "never describes itself",
    "garbled": "describes itself in random bytes",
    "wide": "describes rows of twice the width",
    "bomb": f"describes itself as a holder of {BOMB}",
}
SOCKETS: Mapping[str, str] = {
    "tcpsilent": "accepts connections and says nothing",
    "tcpnoise": "answers random bytes on TCP",
    "tcpclose": "closes every connection",
}
LIES: Mapping[str, str] = {
    **{name: does for name, (does, _) in ANSWERS.items()},
    **DESCRIPTIONS,
    **SOCKETS,
}


class LyingReplica:
    """A server that tells one of LIES. `calls` and `describes` count what it was asked. An async context manager."""

    def __init__(self, lie: str, description: experts_pb2.DescribeReplicaResponse) -> None:
        """`description`: of the honest replica that it stands beside."""
        self.calls = self.describes = 0
        self.port = 0
        self._lie, self._description = lie, description
        self._server: Server | None = None
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> LyingReplica:
        if self._lie in SOCKETS:
            self._listener = await asyncio.start_server(self._connected, HOST, 0)
            self.port = self._listener.sockets[0].getsockname()[1]
            return self
        handlers = {
            "DescribeReplica": grpc.unary_unary_rpc_method_handler(self._describe),
            "Forward": grpc.stream_stream_rpc_method_handler(self._forward),
        }
        self._server = Server([grpc.method_handlers_generic_handler(EXPERT_SERVICE, handlers)], [EXPERT_SERVICE])
        self.port = await self._server.start(HOST, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            await self._server.stop(0)
        if self._listener is not None:
            self._listener.close()

    async def _describe(self, _request: bytes, _context: grpc.aio.ServicerContext) -> bytes:
        self.describes += 1
        described = experts_pb2.DescribeReplicaResponse()
        described.CopyFrom(self._description)
        match self._lie:
            case "mute":
                await asyncio.Event().wait()
            case "garbled":
                return b"\xff" * 200  # no message: a field of an unknown kind
            case "wide":
                described.hidden *= 2
            case "bomb":
                described.held = BOMB
        return described.SerializeToString()

    async def _forward(self, frames: AsyncIterator[bytes], _context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        answer = ANSWERS.get(self._lie, ANSWERS["nan"])[1]
        async for frame in frames:
            call, _ = codec.decode(ForwardRequest, frame)
            if not call.rows:  # a cancellation, which is not answered
                continue
            self.calls += 1
            for reply in answer(call, self._description.hidden):
                yield reply

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.describes += 1
        if self._lie != "tcpclose":
            while await reader.read(4096):
                if self._lie == "tcpnoise":
                    writer.write(os.urandom(4096))
        writer.close()
