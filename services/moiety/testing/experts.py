"""Fake expert replicas: they answer the frames of a real one, and can wait, refuse, answer twice or vanish."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import grpc
import numpy as np
import torch

from moiety.core.experts import ExpertSet, ModelShape
from moiety.core.replica import WIRE_VERSION, Replica, Role
from moiety.core.system import SystemId
from moiety.internal.v1 import experts_pb2
from moiety.registry.memory import MemoryRegistry
from moiety.testing.common import HOST, MODEL, SYSTEM, fake_expert, fake_replica, no_wait, owner_of
from moiety.wire import codec
from moiety.wire.frames import ForwardCall, ReplyCallback, parse_call
from moiety.wire.rows import RowBuffer, SelectedRows, copy_rows
from moiety.wire.server import Server
from moiety.wire.service_names import EXPERT_SERVICE
from moiety.wire.transports.mailbox import Mailbox
from moiety.wire.transports.shm_listener import SharedMemoryListener

OnCall = Callable[[ForwardCall], Awaitable["experts_pb2.Outcome | None"]]


class FakeExperts:
    """An expert replica on loopback that computes `fake_expert`, reachable by every transport.

    `on_call` is awaited before each answer; an outcome that it returns is sent instead of rows. `on_reply` returns the frame
    to send in place of the right one. A test may change `held` while the replica runs; the registry does not see that.
    `copies`: how many times each reply is sent.
    """

    def __init__(
        self,
        replica_id: str,
        held: ExpertSet,
        shape: ModelShape,
        *,
        dtype: str = "float32",
        on_call: OnCall = no_wait,
        copies: int = 1,
        system: SystemId = SYSTEM,
    ):
        self.id, self.held, self.on_call, self.copies = replica_id, held, on_call, copies
        self.system = system
        self.on_reply: Callable[[bytes], bytes] = bytes
        self.calls: list[ForwardCall] = []  # every call that arrived, in order
        self.replica: Replica | None = None  # its registry entry, once started
        self._shape, self._dtype = shape, dtype
        self._row_bytes = shape.mlp.hidden * codec.DTYPES[dtype].itemsize
        self._server: Server | None = None
        self._stack = AsyncExitStack()
        self.near = True  # False: its description names a socket that does not exist here, like that of another node
        self._handling: set[concurrent.futures.Future[None]] = set()  # calls through shared memory
        self._listener: SharedMemoryListener | None = None

    async def start(self, registry: MemoryRegistry) -> None:
        """Serves on a free port and registers."""
        describe = grpc.unary_unary_rpc_method_handler(
            self._describe,
            request_deserializer=experts_pb2.DescribeReplicaRequest.FromString,
            response_serializer=experts_pb2.DescribeReplicaResponse.SerializeToString,
        )
        handlers = {"DescribeReplica": describe, "Forward": grpc.stream_stream_rpc_method_handler(self._forward)}
        server = self._server = Server(
            [grpc.method_handlers_generic_handler(EXPERT_SERVICE, handlers)], [EXPERT_SERVICE]
        )
        mailbox = Mailbox()
        self._stack.enter_context(owner_of(mailbox))
        accept = partial(self._accept, asyncio.get_running_loop(), mailbox)
        self._listener = SharedMemoryListener(str(self.system), self._dtype, self._row_bytes, mailbox, accept)
        self._stack.push_async_callback(self._listener.close)
        port = await server.start(HOST, 0)
        self.replica = fake_replica(self.id, Role.EXPERT, port, held=self.held, system=self.system)
        await registry.register(self.replica)

    def forget(self) -> None:
        """Clears `calls` and cancels, without an answer, the calls that came through shared memory.

        Their payloads are views that would keep the memory of a lost router mapped.
        """
        self.calls.clear()
        for handling in self._handling:
            handling.cancel()
        self._handling.clear()

    async def vanish(self) -> None:
        """Breaks every connection immediately. As when a process is killed, the registry still lists the replica."""
        for handling in self._handling:
            handling.cancel()
        await self._stack.aclose()
        if self._server is not None:
            await self._server.stop(0)

    async def _describe(
        self, _request: experts_pb2.DescribeReplicaRequest, _context: grpc.aio.ServicerContext
    ) -> experts_pb2.DescribeReplicaResponse:
        return experts_pb2.DescribeReplicaResponse(
            model=MODEL,
            system=str(self.system),
            dtype=self._dtype,
            hidden=self._shape.mlp.hidden,
            wire_version=WIRE_VERSION,
            held=str(self.held),
            shared_memory=self._listener.name if self._listener and self.near else "moiety-elsewhere",
        )

    async def _forward(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        writing = asyncio.Lock()

        async def answer(header: experts_pb2.ForwardRequest, call: ForwardCall) -> None:
            frame = self.on_reply(self._reply(header, call, await self.on_call(call)))
            async with writing:
                for _ in range(self.copies):
                    await context.write(frame)

        async with asyncio.TaskGroup() as answers:
            async for frame in frames:
                header, payload = codec.decode(experts_pb2.ForwardRequest, frame)
                answers.create_task(answer(header, self._arrived(header, payload)))

    def _accept(
        self,
        loop: asyncio.AbstractEventLoop,
        mailbox: Mailbox,
        header: experts_pb2.ForwardRequest,
        payload: memoryview,
        answer: ReplyCallback,
    ) -> None:
        """Takes a call from shared memory: computes it on the asyncio loop, and answers it on the mailbox owner's thread."""
        call = self._arrived(header, payload)

        async def handle() -> None:
            frame = self.on_reply(self._reply(header, call, await self.on_call(call)))
            reply = experts_pb2.ForwardResponse.FromString(frame)
            rows = RowBuffer.within(memoryview(reply.payload), 1)
            reply.ClearField("payload")
            mailbox.post(lambda: answer(reply, SelectedRows(rows, np.arange(len(rows)))))

        self._handling.add(asyncio.run_coroutine_threadsafe(handle(), loop))

    def _arrived(self, header: experts_pb2.ForwardRequest, payload: memoryview) -> ForwardCall:
        call = parse_call(header, payload, shape=self._shape, dtype=self._dtype)
        self.calls.append(call)
        return call

    def _reply(
        self, header: experts_pb2.ForwardRequest, call: ForwardCall, outcome: experts_pb2.Outcome | None
    ) -> bytes:
        reply = experts_pb2.ForwardResponse(call_id=header.call_id, attempt=header.attempt)
        if outcome is None and not set(call.experts.tolist()) <= self.held.layer(call.layer):
            outcome = experts_pb2.OUTCOME_NOT_HELD
        if outcome is not None:
            reply.outcome, reply.detail = outcome, f"{self.id} was set to refuse"
            return codec.encode(reply)
        inputs = torch.empty(len(call.experts), self._shape.mlp.hidden, dtype=codec.DTYPES[self._dtype])
        copy_rows(call.payload, RowBuffer.of(inputs), chosen=call.row_of)
        rows = [fake_expert(call.layer, expert, row) for expert, row in zip(call.experts.tolist(), inputs, strict=True)]
        reply.rows, reply.outcome = len(rows), experts_pb2.OUTCOME_OK
        return codec.encode(reply, RowBuffer.of(torch.stack(rows)) if rows else None)
