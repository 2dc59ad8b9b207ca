"""The exactness rule of the transport: how rows are sent must not change a bit of the result.

The fake replicas here compute each row by itself. In a matrix product the bits of a row may depend on the number of rows,
which tests/kernels covers and which would hide a fault of the transport here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moiety.core.expert_backend import CallClass
from moiety.core.experts import ExpertSet
from moiety.core.replica import Transport
from moiety.testing import FakeExperts, fake_layer, fake_shape, loopback_hop
from moiety.wire import codec
from moiety.wire.frames import ForwardCall

SHAPE = fake_shape(layers=2, experts=6, hidden=8, top_k=4)
LAYER = 1


@dataclass(frozen=True)
class Case:
    """One way of sending the same rows."""

    dtype: str
    top_k_index: tuple[tuple[int, ...], ...]  # [T][K], -1 = no expert
    holders: tuple[frozenset[int], ...]  # expert -> replicas that hold it
    delays: tuple[tuple[float, ...], ...]  # replica -> seconds its first calls take
    lost: frozenset[int]  # replicas that vanish at their first call; each expert has a holder that does not
    hedged: bool
    copies: int
    transport: Transport


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draws any routing over any holders; at least one holder of each expert does not vanish."""
    replicas = draw(st.integers(1, 4))
    lost = draw(st.frozensets(st.integers(1, replicas - 1), max_size=2)) if replicas > 1 else frozenset()
    lasting = sorted(set(range(replicas)) - lost)
    everyone = st.frozensets(st.integers(0, replicas - 1))
    holders = [draw(everyone) | {draw(st.sampled_from(lasting))} for _ in range(SHAPE.experts)]
    top_k = draw(st.integers(1, 4))
    expert_of_row = st.integers(-1, SHAPE.experts - 1)
    top_k_index = draw(st.lists(st.tuples(*[expert_of_row] * top_k), min_size=1, max_size=12))
    delay = st.sampled_from((0.0, 0.0, 0.002, 0.01))
    return Case(
        dtype=draw(st.sampled_from(sorted(codec.DTYPES))),
        top_k_index=tuple(top_k_index),
        holders=tuple(holders),
        delays=tuple(tuple(draw(st.lists(delay, min_size=4, max_size=4))) for _ in range(replicas)),
        lost=lost,
        hedged=draw(st.booleans()),
        copies=draw(st.integers(1, 2)),
        transport=draw(st.sampled_from((Transport.SHM, Transport.GRPC))),
    )


def replicas_of(case: Case) -> list[FakeExperts]:
    """Returns fakes that behave as `case` says."""

    def one(index: int) -> FakeExperts:
        ids = [expert for expert, holders in enumerate(case.holders) if index in holders]
        replica = FakeExperts(
            f"e{index}", ExpertSet.uniform(SHAPE.moe_layers, ids), SHAPE, dtype=case.dtype, copies=case.copies
        )

        async def on_call(_call: ForwardCall) -> None:
            if index in case.lost:
                vanishing.append(asyncio.create_task(replica.vanish()))
                await asyncio.Event().wait()  # until `vanish` cancels it
            delays = case.delays[index]
            await asyncio.sleep(delays[min(len(replica.calls), len(delays)) - 1])

        replica.on_call = on_call
        return replica

    vanishing: list[asyncio.Task[None]] = []
    return [one(index) for index in range(len(case.delays))]


async def through(case: Case, hidden: torch.Tensor, top_k_index: torch.Tensor) -> torch.Tensor:
    """Returns the rows that the replicas of `case` send back."""
    options = {"dtype": case.dtype, "transport": case.transport}
    async with loopback_hop(replicas_of(case), SHAPE, hedge_after_s=0.001, retry_budget=1.0, **options) as lane:
        if case.hedged:  # a p99 of 0: every call that is not answered within a millisecond is sent again
            for _ in range(16):
                lane.hop.context.hedging.record_latency(LAYER, CallClass.DECODE, 0.0)
        return await asyncio.wait_for(lane.compute(LAYER, hidden, top_k_index), 20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(case=cases())
def test_no_way_of_sending_rows_changes_a_bit(case: Case):
    """Any transport, partition, overlap, duplicate, hedge, order or loss gives the same rows and sum as one replica."""
    generator = torch.Generator().manual_seed(len(case.top_k_index))
    top_k_index = torch.tensor(case.top_k_index)
    hidden = torch.randn(len(case.top_k_index), SHAPE.mlp.hidden, generator=generator).to(codec.DTYPES[case.dtype])
    expected = fake_layer(LAYER, hidden, top_k_index)

    rows = asyncio.run(through(case, hidden, top_k_index))

    assert rows.dtype is hidden.dtype
    assert torch.equal(rows, expected)
    weights = torch.rand(top_k_index.shape, generator=generator)
    assert torch.equal((rows * weights[..., None]).sum(1), (expected * weights[..., None]).sum(1))
