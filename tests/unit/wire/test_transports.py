"""What every transport must do: the same tests for gRPC over TCP and shared memory."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from moiety.core.experts import ExpertSet
from moiety.core.replica import Transport
from moiety.errors import FailedPrecondition, PeerLost
from moiety.internal.v1.experts_pb2 import OUTCOME_OK, ForwardRequest
from moiety.registry.memory import MemoryRegistry
from moiety.testing import Caller, FakeExperts, eventually, fake_expert, fake_shape, open_caller
from moiety.wire import codec
from moiety.wire.frames import ForwardCall
from moiety.wire.rows import RowBuffer
from moiety.wire.transports.connection import Reply
from moiety.wire.transports.expert_link import ExpertLink
from moiety.wire.transports.mailbox import Mailbox

pytestmark = pytest.mark.timeout(20)

SHAPE = fake_shape(layers=2, experts=4, hidden=1024)
TRANSPORTS = (Transport.SHM, Transport.GRPC)
HANGS = 1  # the layer whose calls are never answered

each_transport = pytest.mark.parametrize("transport", TRANSPORTS)


def call(call_id: int, rows: int, layer: int = 0) -> tuple[ForwardRequest, torch.Tensor]:
    """Returns a call of `rows` rows for expert 3, and the rows."""
    hidden = torch.randn(rows, SHAPE.mlp.hidden, generator=torch.Generator().manual_seed(call_id))
    offsets, experts = np.arange(rows + 1), np.full(rows, 3)
    header = ForwardRequest(call_id=call_id, layer=layer, rows=rows, dtype="float32")
    header.k_offsets, header.experts = codec.int32_bytes(offsets), codec.int32_bytes(experts)
    return header, hidden


def ask(caller: Caller, call_id: int, rows: int = 1, layer: int = 0) -> asyncio.Future[Reply | PeerLost]:
    """Sends the call that `call` returns."""
    header, hidden = call(call_id, rows, layer)
    return caller.send(header, RowBuffer.of(hidden))


def right(answer: Reply | PeerLost, call_id: int, rows: int = 1) -> bool:
    """Returns whether `answer` is the exact answer to `call`'s call."""
    assert isinstance(answer, Reply)
    assert (answer.header.call_id, answer.header.outcome) == (call_id, OUTCOME_OK)
    return bytes(answer.payload) == fake_expert(0, 3, call(call_id, rows)[1]).numpy().tobytes()


async def hang(arrived: ForwardCall) -> None:
    """An `on_call` that never lets calls of layer HANGS be answered."""
    if arrived.layer == HANGS:
        await asyncio.Event().wait()


@asynccontextmanager
async def replica(on_call: Callable[[ForwardCall], Awaitable[None]] = hang, **options) -> AsyncIterator[FakeExperts]:
    """A running replica in this process."""
    experts = FakeExperts("a", ExpertSet.uniform(2, range(4)), SHAPE, on_call=on_call, **options)
    await experts.start(MemoryRegistry())
    try:
        yield experts
    finally:
        await experts.vanish()


@each_transport
async def test_rows_come_back_whatever_their_number(transport: Transport):
    """Calls of no row, one row and 4 MiB of rows are answered, one after the other on one connection."""
    async with replica() as experts, open_caller(experts.replica.address, transport) as caller:
        assert caller.link.transport is transport
        for call_id, rows in enumerate((0, 1, 3, 16, 1024, 1)):
            assert right(await ask(caller, call_id, rows), call_id, rows)


@each_transport
async def test_replies_find_their_calls_in_any_order(transport: Transport):
    """Each of many calls gets its own answer, even when the last one is answered first; a closed link gives PeerLost."""
    turns = [asyncio.Event() for _ in range(8)]

    async def latest_first(arrived: ForwardCall) -> None:
        await turns[arrived.call_id].wait()

    async with replica(latest_first) as experts, open_caller(experts.replica.address, transport) as caller:
        answers = [ask(caller, call_id) for call_id in range(8)]
        for call_id in reversed(range(8)):
            turns[call_id].set()
            assert right(await answers[call_id], call_id)
            assert not any(answer.done() for answer in answers[:call_id])
        await caller.link.close()
        assert isinstance(await ask(caller, 0), PeerLost), "a closed link answers at once"


@each_transport
async def test_a_flood_corrupts_nothing(transport: Transport):
    """Each of five hundred concurrent calls of mixed sizes is answered with its own rows."""
    async with replica() as experts, open_caller(experts.replica.address, transport) as caller:
        sizes = [1 + call_id % 5 for call_id in range(500)]
        answers = [ask(caller, call_id, rows) for call_id, rows in enumerate(sizes)]
        for call_id, rows in enumerate(sizes):
            assert right(await answers[call_id], call_id, rows)


@each_transport
async def test_a_link_that_closes_loses_what_is_open(transport: Transport):
    """Closing a link answers its open calls with PeerLost and does not disturb other routers."""
    async with replica() as experts, open_caller(experts.replica.address, transport) as other:
        async with open_caller(experts.replica.address, transport) as caller:
            lost = [ask(caller, call_id, layer=HANGS) for call_id in range(3)]
            await eventually(lambda: len(experts.calls) == 3)
        assert {type(answer) for answer in await asyncio.gather(*lost)} == {PeerLost}
        assert right(await ask(other, 9), 9)


# Death: real processes, kill -9 --------------------------------------------------------------------------------


@asynccontextmanager
async def child(function: str, *arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Runs `function` of this module in a process; yields the process and the first line that it printed."""
    code = f"import sys, asyncio, {__name__} as here; asyncio.run(here.{function}(*sys.argv[1:]))"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        *arguments,
        cwd=Path(__file__).parent,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def expert_process() -> None:
    """Runs a replica and prints its address."""
    async with replica() as experts:
        print(experts.replica.address, flush=True)
        await asyncio.Event().wait()


async def router_process(address: str) -> None:
    """Runs a router with one open call by every transport."""
    async with (
        open_caller(address, Transport.SHM) as shm,
        open_caller(address, Transport.GRPC) as grpc,
    ):
        for caller in (shm, grpc):
            ask(caller, 0, 64, layer=HANGS)
        print("sent", flush=True)
        await asyncio.Event().wait()


def segments() -> int:
    """Returns how many segments this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:moiety-hop")


def settled_segments() -> int:
    """Returns the same after a garbage collection, without what other tests have left."""
    gc.collect()
    return segments()


def descriptors() -> int:
    """Returns how many files and sockets this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def test_a_killed_replica_is_noticed_at_once_in_the_middle_of_a_call():
    """After kill -9 of a replica its open calls get PeerLost by every transport, without a timeout, and nothing leaks."""
    before = settled_segments()
    async with child("expert_process") as (process, address):
        for transport in TRANSPORTS:
            async with open_caller(address, transport) as caller:
                assert right(await ask(caller, 1, 64), 1, 64)

        async with (
            open_caller(address, Transport.SHM) as shm,
            open_caller(address, Transport.GRPC) as grpc,
        ):
            answers = [ask(caller, 0, 64, layer=HANGS) for caller in (shm, grpc)]
            assert right(await ask(grpc, 2), 2), "an answer shows that the open calls, sent before, have arrived"
            process.send_signal(signal.SIGKILL)
            began = time.monotonic()
            for answer in answers:
                assert isinstance(await answer, PeerLost)
            assert time.monotonic() - began < 1.0
            await asyncio.wait_for(shm.link.connection.closed.wait(), 5)
            assert isinstance(await ask(shm, 3), PeerLost)
    await eventually(lambda: segments() == before)


async def test_a_killed_router_leaves_nothing_behind():
    """After kill -9 of a router with open calls by every transport, the replica frees everything and serves the next."""
    mapped = settled_segments()
    async with replica() as experts:
        address = experts.replica.address
        async with open_caller(address) as first:
            assert right(await ask(first, 1), 1)
        before = descriptors()
        async with child("router_process", address) as (process, said):
            assert said == "sent"
            await eventually(lambda: len(experts.calls) == 3)
            assert segments() == mapped + 1
            process.send_signal(signal.SIGKILL)
            await process.wait()
        experts.forget()
        await eventually(lambda: segments() == mapped)
        await eventually(lambda: descriptors() <= before)
        async with open_caller(address, Transport.SHM) as next_one:
            assert right(await ask(next_one, 2), 2)
        experts.forget()
        await eventually(lambda: segments() == mapped)


# Choosing ------------------------------------------------------------------------------------------------------


async def test_auto_prefers_shared_memory_and_falls_back_to_grpc():
    """`auto` uses shared memory on one node, else gRPC; a transport that is set but cannot reach the replica raises."""
    async with replica() as experts:
        address = experts.replica.address
        async with open_caller(address, Transport.AUTO) as caller:
            assert caller.link.transport is Transport.SHM
        experts.near = False
        async with open_caller(address, Transport.AUTO) as caller:
            assert caller.link.transport is Transport.GRPC
        with pytest.raises(FailedPrecondition, match=f"{address} cannot be reached by shared memory: .*refused"):
            await ExpertLink.open(address, 5, Mailbox(), Transport.SHM)
