"""The hop over loopback replicas: stale tables, losses, waiting, refusals. Exactness is tested in tests/unit/wire/."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from hop_scenarios import EXPECTED, HIDDEN, ROUTING, SHAPE, answers, assert_layer, holder, hop_over

from moiety.core.expert_backend import CallClass
from moiety.core.experts import ExpertSet
from moiety.errors import Cancelled, HopFailed, MoietyError, NoHolder
from moiety.internal.v1 import experts_pb2
from moiety.testing import FakeExperts, eventually, fake_layer, fake_system, loopback_hop
from moiety.wire.frames import ForwardCall

pytestmark = pytest.mark.usefixtures("each_transport")


async def test_each_replica_gets_one_message_with_each_row_once():
    """Each of two groups gets one message; a token with two experts in one group is sent once."""
    low, high = holder("low", "0-1"), holder("high", "2-3")
    async with hop_over(low, high) as lane:
        await assert_layer(lane, call_class=CallClass.PREFILL)
        assert [len(replica.calls) for replica in (low, high)] == [1, 1]
        assert low.calls[0].experts.tolist() == [0, 1, 1]
        assert len(low.calls[0].payload) == 2
        assert low.calls[0].call_class is CallClass.PREFILL


async def test_slots_without_an_expert_are_zero_and_never_sent():
    """-1 in the routing means no expert; a layer of only -1 sends no message."""
    only = holder("only")
    async with hop_over(only) as lane:
        routing = torch.tensor([[0, -1], [-1, -1], [-1, 3]])
        assert torch.equal(await lane.compute(0, HIDDEN, routing), fake_layer(0, HIDDEN, routing))
        assert not torch.any(await lane.compute(0, HIDDEN, torch.full((3, 2), -1)))
        assert len(only.calls) == 1


async def test_a_stale_table_costs_a_second_call_but_no_request():
    """After NOT_HELD, the whole call goes to another replica, and the router learns what the first one holds now."""
    moved, other = holder("a"), holder("b")
    async with hop_over(moved, other) as lane:
        moved.held = ExpertSet.parse("0-1:0")  # the registry still says 0-3
        await assert_layer(lane)
        assert [call.attempt for call in other.calls][-1] == 1
        await eventually(lambda: (0, 1) not in lane.fleet.table.shared)
        before = len(moved.calls)
        await assert_layer(lane)
        assert [call.experts.tolist() for call in moved.calls[before:]] == [[0]]


async def test_a_lost_replica_is_replaced_within_the_call():
    """If every replica but one vanishes at its first call, the last replica returns all rows."""
    leaving = [holder(name) for name in ("a", "b")]
    last = holder("c")
    async with hop_over(*leaving, last) as lane:
        ends: list[asyncio.Task[None]] = []
        for replica in leaving:

            async def vanish(_call: ForwardCall, replica: FakeExperts = replica) -> None:
                ends.append(asyncio.create_task(replica.vanish()))
                await asyncio.Event().wait()

            replica.on_call = vanish
        for layer in (0, 1):
            assert torch.equal(await lane.compute(layer, HIDDEN, ROUTING), fake_layer(layer, HIDDEN, ROUTING))
        assert len(ends) == len(leaving)
        assert last.calls


async def test_no_holder_fails_exactly_the_tokens_concerned():
    """After expert_wait_s, the tokens of uncovered experts fail; the error names layer, experts and the time waited."""
    async with hop_over(holder("a", "0-2"), expert_wait_s=0.2) as lane:
        with pytest.raises(HopFailed) as failed:
            await lane.compute(1, HIDDEN, ROUTING)
        assert failed.value.tokens == [1, 2]
        assert isinstance(failed.value.cause, NoHolder)
        assert (failed.value.cause.layer, failed.value.cause.experts) == (1, [3])
        assert failed.value.cause.waited_s >= 0.2
        assert "expert(s) [3] of MoE layer 1" in str(failed.value)
        assert (1, [3]) in lane.reported_missing
        survivors = ROUTING[:1]
        assert torch.equal(await lane.compute(1, HIDDEN[:1], survivors), fake_layer(1, HIDDEN[:1], survivors))


async def test_a_layer_parks_until_a_replica_registers():
    """Rows without a holder wait; a replica that registers meanwhile gets these rows and no others."""
    late = holder("late", "3")
    async with hop_over(holder("a", "0-2")) as lane:
        parked = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING))
        await eventually(lambda: (0, [3]) in lane.reported_missing)
        await late.start(lane.registry)
        try:
            assert torch.equal(await parked, EXPECTED)
            assert late.calls[0].experts.tolist() == [3, 3]
        finally:
            await late.vanish()


async def test_cancellation_ends_the_wait_of_a_parked_layer():
    """A cancellation ends the wait at once, long before expert_wait_s."""
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise Cancelled("the client closed the stream")

    async with hop_over(holder("a", "0-2"), expert_wait_s=60.0) as lane:
        parked = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING, check=check))
        await eventually(lambda: bool(lane.reported_missing))
        cancelled.set()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(parked, 2)


async def test_a_replica_that_always_refuses_is_not_called_for_ever():
    """A holder that always answers NOT_HELD counts as none: the wait ends after expert_wait_s."""
    async with hop_over(holder("a", on_call=answers(experts_pb2.OUTCOME_NOT_HELD)), expert_wait_s=0.2) as lane:
        with pytest.raises(HopFailed) as failed:
            await lane.compute(0, HIDDEN, ROUTING)
        assert isinstance(failed.value.cause, NoHolder)


async def test_an_overloaded_replica_is_called_again():
    """If the only holder answers OVERLOADED, the hop calls it again later."""
    busy = holder("a")
    async with hop_over(busy) as lane:

        async def on_call(_call: ForwardCall) -> experts_pb2.Outcome | None:
            return experts_pb2.OUTCOME_OVERLOADED if len(busy.calls) < 3 else None

        busy.on_call = on_call
        await assert_layer(lane)
        assert len(busy.calls) == 3


@pytest.mark.parametrize(
    "outcome", [experts_pb2.OUTCOME_FAILED, experts_pb2.OUTCOME_INVALID, experts_pb2.OUTCOME_UNSPECIFIED, 99]
)
async def test_an_error_that_waiting_cannot_cure_fails_at_once(outcome: experts_pb2.Outcome):
    """When every holder fails, the tokens fail with the replica's error, without waiting for expert_wait_s."""
    async with hop_over(holder("a", on_call=answers(outcome)), expert_wait_s=60.0) as lane:
        began = time.monotonic()
        with pytest.raises(HopFailed, match="a was set to refuse") as failed:
            await lane.compute(0, HIDDEN, ROUTING)
        assert failed.value.tokens == [0, 1, 2]
        assert not isinstance(failed.value.cause, NoHolder)
        assert time.monotonic() - began < 10


async def test_a_failure_is_forgotten_once_another_holder_succeeds():
    """One replica fails and another computes its rows: the layer still waits for its missing experts."""
    late = holder("late", "3")
    async with hop_over(holder("a", "0-2", on_call=answers(experts_pb2.OUTCOME_FAILED)), holder("b", "0-2")) as lane:
        parked = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING))
        await eventually(lambda: bool(lane.reported_missing))
        await late.start(lane.registry)
        try:
            assert torch.equal(await parked, EXPECTED)
        finally:
            await late.vanish()


async def test_a_replica_of_another_system_is_not_used():
    """A router uses only replicas of its own system: a holder of another system counts as none."""
    async with loopback_hop([], SHAPE, system=fake_system(groups=4), expert_wait_s=0.2) as lane:
        other = holder("a")
        await other.start(lane.registry)
        try:
            with pytest.raises(HopFailed):
                await lane.compute(0, HIDDEN, ROUTING)
            assert not other.calls
        finally:
            await other.vanish()


async def test_a_message_never_outgrows_the_transport(monkeypatch: pytest.MonkeyPatch):
    """Rows beyond the size limit of a message are split over several messages, and all arrive."""
    monkeypatch.setattr("moiety.router.hop.call.MAX_CALL_BYTES", 2 * 8 * 4)  # two rows of eight float32
    only = holder("only")
    async with hop_over(only) as lane:
        await assert_layer(lane)
        assert [len(call.experts) for call in only.calls] == [2, 2, 2]


async def test_a_malformed_reply_is_that_replicas_failure():
    """A reply of the wrong size is sent again to another holder; without one, the tokens fail and both sizes are named."""

    def truncated(frame: bytes) -> bytes:
        reply = experts_pb2.ForwardResponse.FromString(frame)
        reply.payload = reply.payload[:-5]
        reply.ClearField("payload_bytes")
        return reply.SerializeToString()

    broken = holder("a")
    broken.on_reply = truncated
    async with hop_over(broken) as lane:
        with pytest.raises(HopFailed, match="sent 187 bytes for 6 rows, expected 192"):
            await lane.compute(0, HIDDEN, ROUTING)
        intact = holder("b")
        await intact.start(lane.registry)
        try:
            await eventually(lambda: "b" in lane.fleet.table.replicas)
            await assert_layer(lane)
        finally:
            await intact.vanish()


async def test_demand_counts_every_routed_row_once():
    """Counts equal the model's routing through refusals, duplicates, a lost replica and rows without an expert."""
    generator = torch.Generator().manual_seed(7)
    routings = [torch.randint(-1, 4, (5, 2), generator=generator) for _ in range(12)]
    doomed = holder("c")
    async with hop_over(
        holder("a", copies=2), holder("b", on_call=answers(experts_pb2.OUTCOME_NOT_HELD)), doomed
    ) as lane:
        for number, routing in enumerate(routings):
            if number == 6:
                await doomed.vanish()  # the call in flight to it is sent again
            hidden = torch.ones(5, 8) * number
            layer = number % 2
            assert torch.equal(await lane.compute(layer, hidden, routing), fake_layer(layer, hidden, routing))
        reading = lane.hop.context.demand.reading(5.0)
        for layer in (0, 1):
            of_layer = [routing for number, routing in enumerate(routings) if number % 2 == layer]
            counts = [torch.bincount(routing[routing >= 0], minlength=4) for routing in of_layer]
            assert list(reading.rows[layer]) == sum(counts).tolist()
            assert list(reading.activations[layer]) == sum((count > 0).long() for count in counts).tolist()
        assert reading.time == 5.0


async def test_closing_the_hop_ends_a_call_in_flight():
    """A fleet that closes answers every open call with PeerLost, so that the engine's thread does not wait for ever."""
    hung = holder("a")
    async with hop_over(hung, expert_wait_s=0.1) as lane:
        hung.on_call = lambda _call: asyncio.Event().wait()
        pending = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING))
        await eventually(lambda: bool(hung.calls))
        await lane.fleet.close()
        with pytest.raises(MoietyError):
            await pending
