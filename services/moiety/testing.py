"""Fakes that ship with the project: real gRPC services on loopback with the simplest insides, and a Hop that uses them.

Nothing here mocks the transport: a fake replica reads and answers the frames a real one does, so what is tested against
it is what runs. Its insides can be told to wait, refuse, answer twice or vanish.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import grpc
import numpy as np
import torch

from moiety.core import WIRE_VERSION, CallClass, ExpertMLP, ExpertSet, ModelShape, Replica, Role, Transport
from moiety.errors import MoietyError, PeerLost, ResourceExhausted
from moiety.expert.service import SERVICE
from moiety.load.memory import MemoryRegistry
from moiety.load.watch import Watch
from moiety.router.context import HopSettings, StepContext
from moiety.router.demand import DemandCounter
from moiety.router.fleet import Fleet
from moiety.router.hedge import Hedging
from moiety.router.hop import Hop
from moiety.telemetry.tracing import NO_SPAN, NO_TRACER
from moiety.wire import codec, engine_pb2, engine_pb2_grpc, experts_pb2, generation_pb2, status
from moiety.wire.channels import MAX_MESSAGE_BYTES, Server
from moiety.wire.expert_link import ExpertLink
from moiety.wire.frames import Answerer, ForwardCall, parse_call
from moiety.wire.mailbox import Mailbox
from moiety.wire.shm_listener import SharedMemoryListener
from moiety.wire.transport import Reply

HOST = "127.0.0.1"
MODEL = "fake"
REVISION = "fake-revision"

OnCall = Callable[[ForwardCall], Awaitable["experts_pb2.Outcome | None"]]


def fake_shape(
    *, layers: int = 2, experts: int = 8, top_k: int = 2, hidden: int = 16, vocabulary: int = 320, max_context: int = 64
) -> ModelShape:
    """The shape of a model that exists only as numbers."""
    mlp = ExpertMLP(hidden=hidden, intermediate=2 * hidden)
    return ModelShape("fake", layers, experts, top_k, mlp, "float32", vocabulary, max_context)


def fake_expert(layer: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What fake experts compute for rows [R, D]: a product and a sum, each rounded element by element.

    No row's bits depend on the rows beside it, as they may in a matrix product, so a difference of one bit between two
    ways of sending the same rows is the transport's fault.
    """
    scale, shift = 0.3 + 0.1 * expert + 0.01 * layer, 0.7 - 0.3 * expert
    return rows * scale + shift


def fake_layer(layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
    """The naive twin of a hop over fake replicas: hidden [T, D], top_k_index [T, K] -> [T, K, D], zeros where -1."""
    rows = [
        fake_expert(layer, int(expert), hidden[token]) if expert >= 0 else torch.zeros_like(hidden[token])
        for token, experts in enumerate(top_k_index)
        for expert in experts
    ]
    return torch.stack(rows).view(*top_k_index.shape, -1)


async def at_once(_: object) -> None:
    """Answers without ado."""


@contextmanager
def owner_of(mailbox: Mailbox) -> Iterator[None]:
    """A thread that waits at `mailbox` and does nothing else, for as long as the block runs."""
    over = threading.Event()

    def own() -> None:
        while not over.is_set():
            mailbox.wait()

    thread = threading.Thread(target=own, name="mailbox-owner")
    thread.start()
    try:
        yield
    finally:
        over.set()
        mailbox.wake()
        thread.join()


class FakeExperts:
    """An expert replica on loopback, by every transport, with `fake_expert` inside.

    `on_call` is awaited before each answer; what it returns, if anything, is the outcome sent instead of rows. `held`
    may be changed while it runs without telling the registry; `copies` sends every reply that many times.
    """

    def __init__(
        self,
        replica_id: str,
        held: ExpertSet,
        shape: ModelShape,
        *,
        dtype: str = "float32",
        on_call: OnCall = at_once,
        copies: int = 1,
    ):
        self.id, self.held, self.on_call, self.copies = replica_id, held, on_call, copies
        self.calls: list[ForwardCall] = []  # every call that arrived, in order
        self.replica: Replica | None = None  # its registry entry, once started
        self._shape, self._dtype = shape, dtype
        self._row_bytes = shape.mlp.hidden * codec.DTYPES[dtype].itemsize
        self._unix = f"{SERVICE}-{uuid.uuid4().hex}"
        self._server: Server | None = None
        self._stack = AsyncExitStack()
        self.near = True  # False: describes itself as one on another node does, with names that mean nothing here
        self._handling: set[concurrent.futures.Future[None]] = set()  # calls through shared memory
        self._listener: SharedMemoryListener | None = None

    async def start(self, registry: MemoryRegistry) -> None:
        """Serves on a free port and registers."""
        describe = grpc.unary_unary_rpc_method_handler(
            self._describe,
            request_deserializer=experts_pb2.DescribeRequest.FromString,
            response_serializer=experts_pb2.DescribeResponse.SerializeToString,
        )
        handlers = {"Describe": describe, "Forward": grpc.stream_stream_rpc_method_handler(self._forward)}
        server = self._server = Server([grpc.method_handlers_generic_handler(SERVICE, handlers)], [SERVICE])
        server.grpc.add_insecure_port(f"unix-abstract:{self._unix}")
        mailbox = Mailbox()
        self._stack.enter_context(owner_of(mailbox))
        accept = partial(self._accept, asyncio.get_running_loop(), mailbox)
        self._listener = SharedMemoryListener(REVISION, self._dtype, self._row_bytes, mailbox, accept)
        self._stack.push_async_callback(self._listener.close)
        port = await server.start(HOST, 0)
        self.replica = fake_replica(self.id, Role.EXPERT, port, held=self.held)
        await registry.register(self.replica)

    def forget(self) -> None:
        """Gives up all calls: no answer is made any more, and no view of a router's memory is left."""
        self.calls.clear()
        for handling in self._handling:
            handling.cancel()
        self._handling.clear()

    async def vanish(self) -> None:
        """Breaks every connection at once; the registry is not told, as when a process is killed."""
        for handling in self._handling:
            handling.cancel()
        await self._stack.aclose()
        if self._server is not None:
            await self._server.stop(0)

    async def _describe(
        self, _request: experts_pb2.DescribeRequest, _context: grpc.aio.ServicerContext
    ) -> experts_pb2.DescribeResponse:
        return experts_pb2.DescribeResponse(
            model=MODEL,
            revision=REVISION,
            dtype=self._dtype,
            hidden=self._shape.mlp.hidden,
            wire_version=WIRE_VERSION,
            held=str(self.held),
            max_message_bytes=MAX_MESSAGE_BYTES,
            shared_memory=self._listener.name if self._listener and self.near else "moiety-elsewhere",
            unix=self._unix if self.near else "moiety-elsewhere",
        )

    async def _forward(self, frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        writing = asyncio.Lock()

        async def answer(header: experts_pb2.ForwardRequest, call: ForwardCall) -> None:
            frame = self._reply(header, call, await self.on_call(call))
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
        answer: Answerer,
    ) -> None:
        """A call through shared memory: handled on the loop as others are, answered from the mailbox."""
        call = self._arrived(header, payload)

        async def handle() -> None:
            reply = experts_pb2.ForwardReply.FromString(self._reply(header, call, await self.on_call(call)))
            rows = codec.rows_in(memoryview(reply.payload), 1)
            reply.ClearField("payload")
            mailbox.post(lambda: answer(reply, codec.Picked(rows, np.arange(len(rows)))))

        self._handling.add(asyncio.run_coroutine_threadsafe(handle(), loop))

    def _arrived(self, header: experts_pb2.ForwardRequest, payload: memoryview) -> ForwardCall:
        hidden = self._shape.mlp.hidden
        call = parse_call(header, payload, dtype=self._dtype, hidden=hidden, row_bytes=self._row_bytes)
        self.calls.append(call)
        return call

    def _reply(
        self, header: experts_pb2.ForwardRequest, call: ForwardCall, outcome: experts_pb2.Outcome | None
    ) -> bytes:
        reply = experts_pb2.ForwardReply(call_id=header.call_id, attempt=header.attempt, revision=REVISION)
        if outcome is None and not set(call.experts.tolist()) <= self.held.layer(call.layer):
            outcome = experts_pb2.OUTCOME_NOT_HELD
        if outcome is not None:
            reply.outcome, reply.detail = outcome, f"{self.id} was told to"
            return codec.encode(reply)
        given = torch.empty(len(call.experts), self._shape.mlp.hidden, dtype=codec.DTYPES[self._dtype])
        codec.rows_of(given)[:] = call.payload[call.row_of]
        rows = [fake_expert(call.layer, expert, row) for expert, row in zip(call.experts.tolist(), given, strict=True)]
        reply.rows = len(rows)
        return codec.encode(reply, codec.rows_of(torch.stack(rows)) if rows else None)


class Caller:
    """A link to one replica, as the bare transport: calls go out and answers come back as values."""

    def __init__(self, link: ExpertLink, mailbox: Mailbox):
        self.link, self._mailbox = link, mailbox

    def send(
        self, header: experts_pb2.ForwardRequest, rows: codec.Rows, reply_rows: int | None = None
    ) -> asyncio.Future[Reply | PeerLost]:
        """The answer, its payload copied out of the transport's hands; or what `acquire` raised."""
        future: concurrent.futures.Future[Reply | PeerLost] = concurrent.futures.Future()
        room = len(header.experts) // 4 if reply_rows is None else reply_rows

        def answered(answer: Reply | PeerLost) -> None:
            if isinstance(answer, Reply):
                answer = Reply(answer.header, memoryview(bytes(answer.payload)))
            if not future.cancelled():
                future.set_result(answer)

        def acquire_and_send() -> None:
            try:
                buffer = self.link.connection.acquire(header, rows=len(rows), row_bytes=rows.itemsize, reply_rows=room)
            except MoietyError as error:
                future.set_exception(error)
                return
            buffer.rows[:] = rows
            buffer.send(answered)

        self._mailbox.post(acquire_and_send)
        return asyncio.wrap_future(future)


@asynccontextmanager
async def open_caller(
    address: str, transport: Transport = Transport.GRPC, timeout_s: float = 5.0
) -> AsyncIterator[Caller]:
    """A link to the replica at `address`, and a thread that waits for its answers."""
    mailbox = Mailbox()
    with owner_of(mailbox):
        link = await ExpertLink.open(address, timeout_s, mailbox, transport)
        try:
            yield Caller(link, mailbox)
        finally:
            await link.close()
            mailbox.drain()


@dataclass(slots=True)
class LoopbackHop:
    """A Hop and what it stands on, as a router has them, an engine's thread included."""

    hop: Hop
    fleet: Fleet
    watch: Watch
    registry: MemoryRegistry
    thread: concurrent.futures.Executor
    waited_for: list[tuple[int, list[int]]] = field(default_factory=list)  # (layer, experts) of every wake

    async def compute(
        self,
        layer: int,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        *,
        call_class: CallClass = CallClass.DECODE,
        check: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """One layer's hop, on the engine's thread: [T, K, D]."""

        def run() -> torch.Tensor:
            self.hop.begin_step(StepContext(call_class, NO_SPAN, check, lambda *wake: self.waited_for.append(wake)))
            return self.hop.submit(layer, hidden, top_k_index).result()

        return await asyncio.get_running_loop().run_in_executor(self.thread, run)

    async def idle(self) -> None:
        """What the engine's thread does between steps."""
        while True:
            await asyncio.get_running_loop().run_in_executor(self.thread, self.hop.poll)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def loopback_hop(
    replicas: Sequence[FakeExperts],
    shape: ModelShape,
    *,
    dtype: str = "float32",
    revision: str = REVISION,
    expert_wait_s: float = 5.0,
    hedge_after_s: float = 5.0,
    retry_budget: float = 0.1,
    registry: MemoryRegistry | None = None,
    transport: Transport = Transport.GRPC,
) -> AsyncIterator[LoopbackHop]:
    """Starts `replicas` and a Hop that has found them all; ends everything. Entries of the registry never expire.

    Before a layer has latencies of its own a call is hedged after a second, or `hedge_after_s` where that is more.
    """
    registry = registry or MemoryRegistry(clock=lambda: 0.0)
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await replica.start(registry)
            stack.push_async_callback(replica.vanish)
        watch = Watch(registry, interval_s=0.02)
        await watch.start()
        stack.push_async_callback(watch.stop)
        fleet = Fleet(watch, shape, revision, dtype, transport)
        fleet.start()
        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "engine"))
        stack.push_async_callback(fleet.close)
        settings = HopSettings(revision, codec.DTYPES[dtype], expert_wait_s)
        demand = DemandCounter(shape.moe_layers, shape.experts)
        hop = Hop(fleet, settings, Hedging(hedge_after_s, retry_budget), demand, NO_TRACER)
        await eventually(lambda: {replica.id for replica in replicas} <= set(fleet.table.replicas))
        lane = LoopbackHop(hop, fleet, watch, registry, thread)
        idle = asyncio.create_task(lane.idle())
        try:
            yield lane
        finally:
            idle.cancel()
            await asyncio.wait([idle])


class FakeEngine(engine_pb2_grpc.EngineServicer):
    """A router: the token at each position is a function of prompt, seed, choice and position, as a real engine's is.

    `before_token(position)` is awaited before each token, counted from the first generated one; it may wait or raise
    a MoietyError, which the client is told. More requests than `places` at once are refused. With `blocks`, prefixes
    are cached by blocks of `block_tokens`, the least recently used evicted.
    """

    def __init__(
        self,
        replica_id: str,
        shape: ModelShape,
        *,
        revision: str = REVISION,
        places: int = 1 << 20,
        slots: int = 0,
        blocks: int = 0,
        block_tokens: int = 4,
    ):
        self.id = replica_id
        self.requests: list[engine_pb2.EngineRequest] = []  # accepted, in order of arrival
        self.refused = 0  # requests for which there was no place
        self.cancelled = 0  # requests whose client went away
        self.before_token: Callable[[int], Awaitable[None]] = at_once
        self.places = places
        self._shape, self._revision, self._slots = shape, revision, slots
        self._blocks, self._block_tokens = blocks, block_tokens
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._running = 0
        self._server: Server | None = None

    async def start(self, registry: MemoryRegistry) -> None:
        """Serves on a free port and registers."""
        server = self._server = Server([], ["moiety.v1.Engine"])
        engine_pb2_grpc.add_EngineServicer_to_server(self, server.grpc)
        port = await server.start(HOST, 0)
        await registry.register(fake_replica(self.id, Role.ROUTER, port, revision=self._revision))

    async def vanish(self) -> None:
        """Breaks every stream at once; the registry is not told."""
        if self._server is not None:
            await self._server.stop(0)

    def empty_cache(self) -> None:
        """Evicts every block."""
        self._cached.clear()

    async def Describe(
        self, _request: engine_pb2.EngineDescribeRequest, _context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineDescription:
        return engine_pb2.EngineDescription(
            model=MODEL,
            revision=self._revision,
            max_context=self._shape.max_context,
            vocabulary=self._shape.vocabulary,
            running=self._running,
            slots=self._slots,
            blocks=self._blocks,
            block_tokens=self._block_tokens if self._blocks else 0,
        )

    async def Generate(
        self, request: engine_pb2.EngineRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.EngineEvent]:
        if self._running >= self.places:
            self.refused += 1
            await status.abort(context, ResourceExhausted(f"{self._running} requests of {self.places} run", 0.25))
        self.requests.append(request)
        self._running += 1
        sampling, cached = request.sampling, self._look_up(request)
        choices = range(request.choice, request.choice + (sampling.n or 1))
        try:
            for position in range(len(request.generated_ids), sampling.max_tokens):
                await self.before_token(position)
                for choice in choices:
                    yield self._event(request, choice, position, cached)
        except MoietyError as error:
            await status.abort(context, error)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self._running -= 1

    def _event(
        self, request: engine_pb2.EngineRequest, choice: int, position: int, cached: int
    ) -> engine_pb2.EngineEvent:
        vocabulary, first = self._shape.vocabulary, position == len(request.generated_ids)
        event = engine_pb2.EngineEvent(
            token_ids=[fake_token(request.prompt_ids, request.sampling.seed, position, vocabulary, choice)],
            choice=choice,
            cached_tokens=cached if first else 0,
        )
        if request.sampling.logprobs:
            event.logprobs.append(-float(position))
        if request.sampling.prompt_logprobs and first and choice == request.choice:
            event.prompt_logprobs.extend([-1.0] * (len(request.prompt_ids) - 1))
        if position + 1 == request.sampling.max_tokens:
            event.finish_reason = generation_pb2.FINISH_REASON_LENGTH
        return event

    def _look_up(self, request: engine_pb2.EngineRequest) -> int:
        """How many of the request's tokens are cached; afterwards all its blocks are."""
        ids = [*request.prompt_ids, *request.generated_ids]
        blocks, block = list[int](), hash(request.tenant)
        for end in range(self._block_tokens, len(ids), self._block_tokens) if self._blocks else ():
            block = hash((block, *ids[end - self._block_tokens : end]))
            blocks.append(block)
        found = next((i for i, block in enumerate(blocks) if block not in self._cached), len(blocks))
        for block in reversed(blocks):
            self._cached[block] = None
            self._cached.move_to_end(block)
        while len(self._cached) > self._blocks:
            self._cached.popitem(last=False)
        return found * self._block_tokens


def fake_token(prompt: Sequence[int], seed: int, position: int, vocabulary: int, choice: int = 0) -> int:
    """The token a FakeEngine generates at `position` (from 0) of a choice."""
    philox = np.random.Philox(key=seed + sum(prompt), counter=[position, choice, 0, 0])
    return int(np.random.Generator(philox).integers(vocabulary))


def fake_replica(
    replica_id: str, role: Role, port: int, *, held: ExpertSet | None = None, revision: str = REVISION
) -> Replica:
    """The registry entry of a ready service on this machine."""
    return Replica(
        id=replica_id,
        role=role,
        deployment=role.value,
        address=f"{HOST}:{port}",
        node="here",
        model=MODEL,
        revision=revision,
        held=held or ExpertSet(),
    )


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Returns once `condition` holds; raises TimeoutError when it does not within `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
