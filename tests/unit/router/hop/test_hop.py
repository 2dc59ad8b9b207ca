"""The hop over loopback replicas: stale tables, losses, waiting, hedges, refusals. Exactness has its own test in wire/."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest
import torch

from moiety.core.expert_backend import CallClass
from moiety.core.experts import ExpertSet
from moiety.core.replica import Transport
from moiety.errors import Cancelled, HopFailed, MoietyError, NoHolder
from moiety.internal.v1 import experts_pb2
from moiety.router.hop.hedging import BURST, Hedging
from moiety.testing import FakeExperts, LoopbackHop, eventually, fake_layer, fake_shape, loopback_hop
from moiety.wire.frames import ForwardCall

SHAPE = fake_shape(layers=2, experts=4, hidden=8)
HIDDEN = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
ROUTING = torch.tensor([[0, 1], [2, 3], [1, 3]])
EXPECTED = fake_layer(0, HIDDEN, ROUTING)


def holder(replica_id: str, experts: str = "0-3", **options) -> FakeExperts:
    """A fake replica that holds these experts in both layers."""
    return FakeExperts(replica_id, ExpertSet.parse(f"0-1:{experts}"), SHAPE, **options)


TRANSPORT = Transport.GRPC


@pytest.fixture(params=[Transport.GRPC, Transport.SHM], autouse=True)
def _transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds whatever carries the calls: gRPC tells the loop of a loss first, memory the engine."""
    monkeypatch.setitem(globals(), "TRANSPORT", request.param)


def run(scenario: Callable[[LoopbackHop], Awaitable[None]], *replicas: FakeExperts, **options) -> None:
    """`scenario` with a hop over `replicas`; 20 s is far more than any needs."""

    async def whole() -> None:
        options.setdefault("transport", TRANSPORT)
        async with asyncio.timeout(20), loopback_hop(replicas, SHAPE, **options) as lane:
            await scenario(lane)

    asyncio.run(whole())


async def right(lane: LoopbackHop, **options) -> None:
    """One layer comes back as it should."""
    assert torch.equal(await lane.compute(0, HIDDEN, ROUTING, **options), EXPECTED)


def answers(outcome: experts_pb2.Outcome) -> Callable[[ForwardCall], Awaitable[experts_pb2.Outcome]]:
    """An `on_call` that always refuses."""

    async def on_call(_call: ForwardCall) -> experts_pb2.Outcome:
        return outcome

    return on_call


def test_each_replica_gets_one_message_with_each_row_once():
    """Two groups, one message each, and a token that needs two experts of one group travels once."""
    low, high = holder("low", "0-1"), holder("high", "2-3")

    async def scenario(lane: LoopbackHop) -> None:
        await right(lane, call_class=CallClass.PREFILL)
        assert [len(replica.calls) for replica in (low, high)] == [1, 1]
        assert low.calls[0].experts.tolist() == [0, 1, 1]
        assert len(low.calls[0].payload) == 2
        assert low.calls[0].call_class is CallClass.PREFILL

    run(scenario, low, high)


def test_slots_without_an_expert_are_zero_and_never_sent():
    """-1 in the routing means no expert; a layer of nothing else sends no message."""
    only = holder("only")

    async def scenario(lane: LoopbackHop) -> None:
        routing = torch.tensor([[0, -1], [-1, -1], [-1, 3]])
        assert torch.equal(await lane.compute(0, HIDDEN, routing), fake_layer(0, HIDDEN, routing))
        assert not torch.any(await lane.compute(0, HIDDEN, torch.full((3, 2), -1)))
        assert len(only.calls) == 1

    run(scenario, only)


def test_a_stale_table_costs_a_detour_not_a_request():
    """NOT_HELD from one replica sends the whole call to another, and the router learns what is held now."""
    moved, other = holder("a"), holder("b")

    async def scenario(lane: LoopbackHop) -> None:
        moved.held = ExpertSet.parse("0-1:0")  # the registry still says 0-3
        await right(lane)
        assert [call.attempt for call in other.calls][-1] == 1
        await eventually(lambda: (0, 1) not in lane.fleet.table.shared)
        before = len(moved.calls)
        await right(lane)
        assert all(call.experts.tolist() == [0] for call in moved.calls[before:])

    run(scenario, moved, other)


def test_a_lost_replica_is_replaced_within_the_call():
    """Every replica but one vanishes at its first call: its rows come from the last."""
    leaving = [holder(name) for name in ("a", "b")]
    last = holder("c")

    async def scenario(lane: LoopbackHop) -> None:
        ends: list[asyncio.Task[None]] = []
        for replica in leaving:

            async def vanish(_call: ForwardCall, replica: FakeExperts = replica) -> None:
                ends.append(asyncio.create_task(replica.vanish()))
                await asyncio.Event().wait()

            replica.on_call = vanish
        for layer in (0, 1):
            assert torch.equal(await lane.compute(layer, HIDDEN, ROUTING), fake_layer(layer, HIDDEN, ROUTING))
        assert last.calls

    run(scenario, *leaving, last)


def test_no_holder_fails_exactly_the_tokens_concerned():
    """After expert_wait_s the tokens of uncovered experts fail, the error naming layer, experts and the time waited."""

    async def scenario(lane: LoopbackHop) -> None:
        with pytest.raises(HopFailed) as failed:
            await lane.compute(1, HIDDEN, ROUTING)
        assert failed.value.tokens == [1, 2]
        assert isinstance(failed.value.cause, NoHolder)
        assert (failed.value.cause.layer, failed.value.cause.experts) == (1, [3])
        assert failed.value.cause.waited_s >= 0.2
        assert "expert(s) [3] of MoE layer 1" in str(failed.value)
        assert (1, [3]) in lane.waited_for
        survivors = ROUTING[:1]
        assert torch.equal(await lane.compute(1, HIDDEN[:1], survivors), fake_layer(1, HIDDEN[:1], survivors))

    run(scenario, holder("a", "0-2"), expert_wait_s=0.2)


def test_a_layer_parks_until_a_replica_registers():
    """Rows that nobody holds wait; the replica that registers meanwhile gets them, and only them."""
    late = holder("late", "3")

    async def scenario(lane: LoopbackHop) -> None:
        parked = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING))
        await eventually(lambda: (0, [3]) in lane.waited_for)
        await late.start(lane.registry)
        try:
            assert torch.equal(await parked, EXPECTED)
            assert late.calls[0].experts.tolist() == [3, 3]
        finally:
            await late.vanish()

    run(scenario, holder("a", "0-2"))


def test_a_parked_layer_gives_up_when_its_step_does():
    """Cancellation while parked ends the wait at once, long before expert_wait_s."""
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise Cancelled("the client closed the stream")

    async def scenario(lane: LoopbackHop) -> None:
        parked = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING, check=check))
        await eventually(lambda: bool(lane.waited_for))
        cancelled.set()
        with pytest.raises(Cancelled):
            await asyncio.wait_for(parked, 2)

    run(scenario, holder("a", "0-2"), expert_wait_s=60.0)


def test_a_replica_that_always_refuses_is_not_asked_for_ever():
    """Holders that say NOT_HELD or OVERLOADED whenever they are asked count as none: the wait ends."""
    for outcome in (experts_pb2.OUTCOME_NOT_HELD, experts_pb2.OUTCOME_OVERLOADED):

        async def scenario(lane: LoopbackHop) -> None:
            with pytest.raises(HopFailed) as failed:
                await lane.compute(0, HIDDEN, ROUTING)
            assert isinstance(failed.value.cause, NoHolder)

        run(scenario, holder("a", on_call=answers(outcome)), expert_wait_s=0.2)


def test_an_overloaded_replica_is_asked_again():
    """OVERLOADED by the only holder means later, not never."""
    busy = holder("a")

    async def scenario(lane: LoopbackHop) -> None:
        async def on_call(_call: ForwardCall) -> experts_pb2.Outcome | None:
            return experts_pb2.OUTCOME_OVERLOADED if len(busy.calls) < 3 else None

        busy.on_call = on_call
        await right(lane)
        assert len(busy.calls) == 3

    run(scenario, busy)


@pytest.mark.parametrize("outcome", [experts_pb2.OUTCOME_FAILED, experts_pb2.OUTCOME_INVALID, 99])
def test_what_no_waiting_can_mend_fails_at_once(outcome: experts_pb2.Outcome):
    """When every holder's computation fails, the tokens fail with what the replica said, without expert_wait_s."""

    async def scenario(lane: LoopbackHop) -> None:
        began = time.monotonic()
        with pytest.raises(HopFailed, match="a was told to") as failed:
            await lane.compute(0, HIDDEN, ROUTING)
        assert failed.value.tokens == [0, 1, 2]
        assert not isinstance(failed.value.cause, NoHolder)
        assert time.monotonic() - began < 10

    run(scenario, holder("a", on_call=answers(outcome)), expert_wait_s=60.0)


def test_a_failure_that_another_holder_mended_is_forgotten():
    """One replica fails, another computes its rows; experts that are missing meanwhile are waited for, not failed."""
    late = holder("late", "3")

    async def scenario(lane: LoopbackHop) -> None:
        parked = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING))
        await eventually(lambda: bool(lane.waited_for))
        await late.start(lane.registry)
        try:
            assert torch.equal(await parked, EXPECTED)
        finally:
            await late.vanish()

    run(scenario, holder("a", "0-2", on_call=answers(experts_pb2.OUTCOME_FAILED)), holder("b", "0-2"))


def test_a_replica_of_another_revision_is_left_out():
    """A router admits only its own revision: the only holder of another one counts as none."""

    async def scenario() -> None:
        async with loopback_hop([], SHAPE, revision="ours", expert_wait_s=0.2) as lane:
            other = holder("a")
            await other.start(lane.registry)
            try:
                with pytest.raises(HopFailed):
                    await lane.compute(0, HIDDEN, ROUTING)
                assert not other.calls
            finally:
                await other.vanish()

    asyncio.run(scenario())


def test_a_message_never_outgrows_the_transport(monkeypatch: pytest.MonkeyPatch):
    """Rows beyond the bound of a message go in several, and all arrive."""
    monkeypatch.setattr("moiety.router.hop.layer_call.MAX_CALL_BYTES", 2 * 8 * 4)  # two rows of eight float32
    only = holder("only")

    async def scenario(lane: LoopbackHop) -> None:
        await right(lane)
        assert [len(call.experts) for call in only.calls] == [2, 2, 2]

    run(scenario, only)


# Hedges --------------------------------------------------------------------------------------------------------


def warm(lane: LoopbackHop) -> None:
    """Gives layer 0 a p99 of nothing, so that hedges fire after `hedge_after_s`."""
    for _ in range(16):
        lane.hop.hedging.answered(0, CallClass.DECODE, 0.0)


def test_a_hung_replica_is_bridged_and_avoided_until_it_answers():
    """A hedge brings the rows; the hung replica gets no call until its late answer shows that it lives."""
    released = asyncio.Event()
    hung, other = holder("a"), holder("b")

    async def scenario(lane: LoopbackHop) -> None:
        async def wait(_call: ForwardCall) -> None:
            await released.wait()

        hung.on_call = wait
        warm(lane)
        await right(lane)
        assert lane.fleet.suspects == {"a"}
        asked = len(hung.calls)
        for _ in range(5):
            await right(lane)
        assert len(hung.calls) == asked
        assert not other.calls[-1].attempt
        released.set()
        await eventually(lambda: not lane.fleet.suspects)
        await right(lane)
        assert len(hung.calls) > asked

    run(scenario, hung, other, hedge_after_s=0.02)


def test_a_suspect_that_alone_holds_an_expert_is_asked_all_the_same():
    """A slow holder is better than none."""
    slow = holder("a")

    async def scenario(lane: LoopbackHop) -> None:
        lane.fleet.suspects.add("a")
        await right(lane)
        assert not lane.fleet.suspects, "its answer clears it"

    run(scenario, slow, holder("b", "0-1"))


def test_a_replica_that_has_just_answered_is_no_suspect():
    """A hedge that wins by a hair must not bar the other replica, whose answer has already come."""

    async def scenario(lane: LoopbackHop) -> None:
        await right(lane)
        lane.fleet.suspect("a", 1)  # the call that was answered
        assert not lane.fleet.suspects

    run(scenario, holder("a"))


def test_hedges_keep_to_their_budget():
    """With nothing but slow replicas, hedges are at most the burst and the budgeted share of all calls."""
    both = [holder("a"), holder("b")]

    async def slow(_call: ForwardCall) -> None:
        await asyncio.sleep(0.01)

    async def scenario(lane: LoopbackHop) -> None:
        for replica in both:
            replica.on_call = slow
        lane.hop.hedging = Hedging(0.001, 0.1, factor=0.0)  # a hedge is due after a millisecond, always
        warm(lane)
        for _ in range(40):
            lane.fleet.suspects.clear()
            await right(lane)
        calls = [call for replica in both for call in replica.calls]
        hedges = sum(call.attempt > 0 for call in calls)
        assert 5 <= hedges <= BURST + 0.1 * len(calls)

    run(scenario, *both)


def test_a_malformed_reply_is_that_replicas_failure(monkeypatch: pytest.MonkeyPatch):
    """Rows of the wrong size are refused and had from another holder; alone, the tokens fail with both sizes told."""
    liar = holder("a")

    original = liar._reply

    def truncated(header, call, outcome):
        reply = experts_pb2.ForwardResponse.FromString(original(header, call, outcome))
        reply.payload = reply.payload[:-5]
        reply.ClearField("payload_bytes")
        return reply.SerializeToString()

    monkeypatch.setattr(liar, "_reply", truncated)

    async def scenario(lane: LoopbackHop) -> None:
        with pytest.raises(HopFailed, match="sent 187 bytes for 6 rows, which are 192"):
            await lane.compute(0, HIDDEN, ROUTING)
        honest = holder("b")
        await honest.start(lane.registry)
        try:
            await eventually(lambda: "b" in lane.fleet.table.replicas)
            await right(lane)
        finally:
            await honest.vanish()

    run(scenario, liar)


def test_demand_is_the_routing_to_the_row():
    """Counts equal what the model routed, decision by decision: through refusals, duplicates, a lost replica, no expert."""
    generator = torch.Generator().manual_seed(7)
    routings = [torch.randint(-1, 4, (5, 2), generator=generator) for _ in range(12)]
    doomed = holder("c")

    async def scenario(lane: LoopbackHop) -> None:
        for number, routing in enumerate(routings):
            if number == 6:
                await doomed.vanish()  # the call in flight to it is sent again
            hidden = torch.ones(5, 8) * number
            layer = number % 2
            assert torch.equal(await lane.compute(layer, hidden, routing), fake_layer(layer, hidden, routing))
        reading = lane.hop.demand.reading(5.0)
        for layer in (0, 1):
            mine = [routing for number, routing in enumerate(routings) if number % 2 == layer]
            counts = [torch.bincount(routing[routing >= 0], minlength=4) for routing in mine]
            assert list(reading.rows[layer]) == sum(counts).tolist()
            assert list(reading.activations[layer]) == sum((count > 0).long() for count in counts).tolist()
        assert reading.time == 5.0

    run(scenario, holder("a", copies=2), holder("b", on_call=answers(experts_pb2.OUTCOME_NOT_HELD)), doomed)


def test_closing_the_hop_ends_a_call_in_flight():
    """A fleet that closes answers whatever is open with a loss, so that no engine thread waits for ever."""
    hung = holder("a")

    async def scenario(lane: LoopbackHop) -> None:
        hung.on_call = lambda _call: asyncio.Event().wait()
        pending = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING))
        await eventually(lambda: bool(hung.calls))
        await lane.fleet.close()
        with pytest.raises(MoietyError):
            await pending

    run(scenario, hung, expert_wait_s=0.1)
