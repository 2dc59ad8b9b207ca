"""The router's end of calls to fake replicas: a bare link to one replica, or a whole Hop over loopback."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import torch

from moiety.core.expert_backend import CallClass
from moiety.core.experts import ModelShape
from moiety.core.replica import Transport
from moiety.core.supervise import spawn
from moiety.core.system import SystemId
from moiety.errors import MoietyError, PeerLost
from moiety.internal.v1 import experts_pb2
from moiety.registry.memory import MemoryRegistry
from moiety.registry.watch import Watch
from moiety.router.hop.call_limits import CallLimits
from moiety.router.hop.context import HopContext
from moiety.router.hop.cost_fit import CostFit
from moiety.router.hop.expert_demand import ExpertDemandCounter
from moiety.router.hop.fleet import Fleet
from moiety.router.hop.hedging import Hedging
from moiety.router.hop.hop import Hop
from moiety.router.step_context import StepContext
from moiety.telemetry.tracing import NO_SPAN, NO_TRACER
from moiety.testing.common import SYSTEM, eventually, owner_of
from moiety.testing.experts import FakeExperts
from moiety.wire import codec
from moiety.wire.rows import RowBuffer, copy_rows
from moiety.wire.transports.connection import Reply
from moiety.wire.transports.expert_link import ExpertLink
from moiety.wire.transports.mailbox import Mailbox


class Caller:
    """A link to one replica, without the hop: sends single calls and returns their answers."""

    def __init__(self, link: ExpertLink, mailbox: Mailbox):
        self.link, self._mailbox = link, mailbox

    def send(
        self, header: experts_pb2.ForwardRequest, rows: RowBuffer, reply_rows: int | None = None
    ) -> asyncio.Future[Reply | PeerLost]:
        """Sends a call. The future returns the answer, with its payload copied, or raises the error of `Connection.acquire`."""
        future: concurrent.futures.Future[Reply | PeerLost] = concurrent.futures.Future()
        most = len(header.experts) // 4 if reply_rows is None else reply_rows

        def answered(answer: Reply | PeerLost) -> None:
            if isinstance(answer, Reply):
                answer = Reply(answer.header, memoryview(bytes(answer.payload)))
            if not future.cancelled():
                future.set_result(answer)

        def acquire_and_send() -> None:
            try:
                buffer = self.link.connection.acquire(header, rows=len(rows), row_bytes=rows.row_bytes, reply_rows=most)
            except MoietyError as error:
                future.set_exception(error)
                return
            copy_rows(rows, buffer.rows)
            buffer.send(answered)

        self._mailbox.post(acquire_and_send)
        return asyncio.wrap_future(future)

    def cancel(self, call_id: int, attempt: int) -> asyncio.Future[None]:
        """Cancels a call that `send` sent earlier. The future ends once the cancellation is on its way."""
        future: concurrent.futures.Future[None] = concurrent.futures.Future()

        def cancel_call() -> None:
            self.link.connection.cancel(call_id, attempt)
            future.set_result(None)

        self._mailbox.post(cancel_call)
        return asyncio.wrap_future(future)


@asynccontextmanager
async def open_caller(
    address: str, transport: Transport = Transport.GRPC, timeout_s: float = 5.0
) -> AsyncIterator[Caller]:
    """Opens a link to the replica at `address`, with a thread that waits for its answers."""
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
    """A Hop with the objects that it uses in a router, and a thread that takes the place of the engine's thread."""

    hop: Hop
    fleet: Fleet
    watch: Watch
    registry: MemoryRegistry
    thread: concurrent.futures.Executor
    # (layer, experts) that had no live replica
    reported_missing: list[tuple[int, list[int]]] = field(default_factory=list)

    async def compute(
        self,
        layer: int,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        *,
        call_class: CallClass = CallClass.DECODE,
        check: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Computes one layer's hop on the engine's thread; returns [T, K, D]."""

        def run() -> torch.Tensor:
            step = StepContext(call_class, NO_SPAN, check, lambda *missing: self.reported_missing.append(missing))
            return self.hop.begin_step(step).submit(layer, hidden, top_k_index).result()

        return await asyncio.get_running_loop().run_in_executor(self.thread, run)

    async def idle(self) -> None:
        """Polls the hop, as the engine's thread does between steps, until this coroutine is cancelled."""
        while True:
            await asyncio.get_running_loop().run_in_executor(self.thread, self.hop.poll)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def loopback_hop(
    replicas: Sequence[FakeExperts],
    shape: ModelShape,
    *,
    dtype: str = "float32",
    system: SystemId = SYSTEM,
    expert_wait_s: float = 5.0,
    hedge_after_s: float = 5.0,
    hedge_factor: float = 3.0,
    retry_budget: float = 0.1,
    registry: MemoryRegistry | None = None,
    transport: Transport = Transport.GRPC,
) -> AsyncIterator[LoopbackHop]:
    """Starts `replicas` and a Hop, waits until the Hop has found all replicas, and stops everything at the end.

    Entries of the default `registry` never expire. Until enough latencies of a layer are measured, a call is hedged after
    one second, or after `hedge_after_s` if that is longer; then after `hedge_factor` times their p99, or `hedge_after_s`.
    """
    registry = registry or MemoryRegistry(clock=lambda: 0.0)
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await replica.start(registry)
            stack.push_async_callback(replica.vanish)
        watch = Watch(registry, interval_s=0.02)
        await watch.start()
        stack.push_async_callback(watch.stop)
        fleet = Fleet(watch, shape, system, dtype, transport)
        fleet.start()
        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1, "engine"))
        stack.push_async_callback(fleet.close)
        rows = codec.DTYPES[dtype]
        costs = CostFit(shape.mlp.parameters * rows.itemsize)
        context = HopContext(
            fleet=fleet,
            system_key=system.key,
            dtype=rows,
            expert_wait_s=expert_wait_s,
            hedging=Hedging(hedge_after_s, retry_budget, hedge_factor),
            demand=ExpertDemandCounter(shape.moe_layers, shape.experts),
            costs=costs,
            limits=CallLimits(costs, shape.experts),
            tracer=NO_TRACER,
            wait=fleet.mailbox.wait,
        )
        await eventually(lambda: {replica.id for replica in replicas} <= set(fleet.table.replicas))
        lane = LoopbackHop(Hop(context), fleet, watch, registry, thread)
        idle = spawn("idle hop", lane.idle())
        try:
            yield lane
        finally:
            idle.cancel()
            await asyncio.wait([idle])
