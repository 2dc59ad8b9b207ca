"""What the tests of the hop share: fake holders, a layer with its expected result, and a running hop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import torch

from moiety.core.experts import ExpertSet
from moiety.core.replica import Transport
from moiety.internal.v1 import experts_pb2
from moiety.testing import FakeExperts, LoopbackHop, fake_layer, fake_shape, loopback_hop
from moiety.wire.frames import ForwardCall

SHAPE = fake_shape(layers=2, experts=4, hidden=8)
HIDDEN = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
ROUTING = torch.tensor([[0, 1], [2, 3], [1, 3]])
EXPECTED = fake_layer(0, HIDDEN, ROUTING)

TRANSPORT = Transport.GRPC  # of the running test: see the fixture `each_transport`


def holder(replica_id: str, experts: str = "0-3", **options) -> FakeExperts:
    """A fake replica that holds these experts in both layers."""
    return FakeExperts(replica_id, ExpertSet.parse(f"0-1:{experts}"), SHAPE, **options)


@asynccontextmanager
async def hop_over(*replicas: FakeExperts, **options) -> AsyncIterator[LoopbackHop]:
    """A hop over `replicas`, for at most 20 s."""
    options.setdefault("transport", TRANSPORT)
    async with asyncio.timeout(20), loopback_hop(replicas, SHAPE, **options) as lane:
        yield lane


async def assert_layer(lane: LoopbackHop, **options) -> None:
    """Asserts that layer 0 returns the expected rows."""
    assert torch.equal(await lane.compute(0, HIDDEN, ROUTING, **options), EXPECTED)


def answers(outcome: experts_pb2.Outcome) -> Callable[[ForwardCall], Awaitable[experts_pb2.Outcome]]:
    """An `on_call` that answers every call with `outcome`."""

    async def on_call(_call: ForwardCall) -> experts_pb2.Outcome:
        return outcome

    return on_call
