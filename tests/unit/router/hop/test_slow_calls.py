"""Slow is not dead: a call is waited for as long as its replica is expected to take, bridged if it can be, and cancelled."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest
import torch
from hop_scenarios import EXPECTED, HIDDEN, ROUTING, assert_layer, holder, hop_over

from moiety.core.expert_backend import CallClass
from moiety.errors import Cancelled, HopFailed, Unavailable
from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.router.hop.call_limits import FACTOR, FLOOR_S, CallLimits
from moiety.router.hop.cost_fit import CostFit
from moiety.router.hop.layer_call import LayerCall
from moiety.router.step_context import StepContext
from moiety.telemetry.tracing import NO_SPAN
from moiety.testing import FakeExperts, LoopbackHop, eventually, fake_layer
from moiety.wire.frames import ForwardCall

pytestmark = pytest.mark.usefixtures("each_transport")


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes calls late after 0.1 s."""
    monkeypatch.setattr("moiety.router.hop.call_limits.FLOOR_S", 0.1)


def hang(replica: FakeExperts) -> asyncio.Event:
    """Makes `replica` answer no call until the returned event is set."""
    released = asyncio.Event()

    async def wait(_call: ForwardCall) -> None:
        await released.wait()

    replica.on_call = wait
    return released


def spend_hedges(lane: LoopbackHop) -> None:
    """Uses up the hedge budget."""
    while lane.hop.context.hedging.take():
        pass


@pytest.mark.usefixtures("short_limits")
async def test_a_slow_only_holder_keeps_its_rows():
    """A call that takes many times its limit is sent once, over the same connection, and its answer is used."""
    slow = holder("a")

    async def take_long(_call: ForwardCall) -> None:
        await asyncio.sleep(1.0)

    async with hop_over(slow) as lane:
        slow.on_call = take_long
        await assert_layer(lane)
        assert (len(slow.calls), slow.cancelled, slow.describes) == (1, [], 1)


@pytest.mark.usefixtures("short_limits")
async def test_a_silent_replica_is_bridged_without_a_budget():
    """Past the limit another holder gets the rows although no hedge is left; the given up call is cancelled."""
    hung, other = holder("a"), holder("b")
    async with hop_over(hung, other, retry_budget=0.0) as lane:
        hang(hung)
        spend_hedges(lane)
        began = time.monotonic()
        await assert_layer(lane)
        assert 0.1 <= time.monotonic() - began < 4.0, "the hedge delay is 5 s"
        lost = [(call.call_id, call.attempt) for call in hung.calls]
        gc.collect()
        assert not [held for held in gc.get_objects() if type(held) is LayerCall], "it keeps no rows in memory"
        await eventually(lambda: hung.cancelled == lost)
        for _ in range(5):
            await assert_layer(lane)
        assert len(hung.calls) == len(lost), "it is avoided until it answers"


async def test_a_busy_replica_is_hedged_within_the_budget_only(monkeypatch: pytest.MonkeyPatch):
    """A replica that answers other calls is not silent: without a budget its slow call is waited for."""
    monkeypatch.setattr("moiety.router.hop.call_limits.FLOOR_S", 0.5)
    busy, other = holder("a"), holder("b", "0-2")

    async def one_call_is_slow(call: ForwardCall) -> None:
        await asyncio.sleep(1.2 if call.layer == 0 else 0.02 * call.call_id)

    async with hop_over(busy, other, retry_budget=0.0) as lane:
        busy.on_call = one_call_is_slow
        spend_hedges(lane)

        def run() -> torch.Tensor:
            step = StepContext(CallClass.DECODE, NO_SPAN, lambda: None, lambda *_: None)
            backend = lane.hop.begin_step(step)
            slow, *others = [backend.submit(int(layer > 0), HIDDEN[:1], ROUTING[:1]) for layer in range(33)]
            for pending in others:
                pending.result()
            return slow.result()

        result = await asyncio.get_running_loop().run_in_executor(lane.thread, run)
        assert torch.equal(result, EXPECTED[:1])
        assert all(call.attempt == 0 for replica in (busy, other) for call in replica.calls)


@pytest.mark.usefixtures("short_limits")
async def test_a_silent_only_holder_ends_its_rows_after_the_wait():
    """After expert_wait_s beyond the limit, the error names the replica, the layer and the time, and is retryable."""
    hung = holder("a")
    async with hop_over(hung, expert_wait_s=0.3) as lane:
        hang(hung)
        with pytest.raises(HopFailed, match=r"layer 0: replica a has not answered for \d\.\d s") as end:
            await lane.compute(0, HIDDEN, ROUTING)
        assert isinstance(end.value.cause, Unavailable)
        assert len(hung.calls) == 1
        assert lane.fleet.breakers.open == {"a"}, "this is visible"
        await eventually(lambda: len(hung.cancelled) == 1)


@pytest.mark.usefixtures("short_limits")
async def test_rows_are_sent_once_to_each_of_several_silent_holders():
    """Where every holder hangs, none gets the same rows twice, and the layer ends as with an only holder."""
    first, second = holder("a", "0"), holder("b", "0")
    async with hop_over(first, second, expert_wait_s=0.5) as lane:
        hang(first)
        hang(second)
        with pytest.raises(HopFailed, match=r"layer 0: replica [ab] has not answered for \d\.\d s"):
            async with asyncio.timeout(5.0):
                await lane.compute(0, HIDDEN, torch.zeros(3, 1, dtype=torch.int64))
        assert (len(first.calls), len(second.calls)) == (1, 1)


@pytest.mark.usefixtures("short_limits")
async def test_rows_of_a_silent_holder_go_to_a_holder_that_comes():
    """A replica that registers meanwhile gets the rows."""
    hung, late = holder("a"), holder("late")
    async with hop_over(hung) as lane:
        hang(hung)
        waiting = asyncio.create_task(lane.compute(0, HIDDEN, ROUTING))
        await eventually(lambda: bool(hung.calls))
        await late.start(lane.registry)
        try:
            assert torch.equal(await waiting, EXPECTED)
        finally:
            await late.vanish()


@pytest.mark.usefixtures("short_limits")
async def test_a_bridge_that_is_lost_is_built_again():
    """The second holder is lost with the rows of a silent one: the third gets them."""
    hung, doomed, last = holder("a", "0"), holder("b", "0"), holder("c", "0")
    async with hop_over(hung, doomed) as lane:
        hang(hung)
        routing = torch.zeros(3, 1, dtype=torch.int64)
        lane.fleet.breakers.overtaken("b", time.monotonic(), 60.0)  # so that the rows go to a
        ends: list[asyncio.Task[None]] = []

        async def vanish(_call: ForwardCall) -> None:
            ends.append(asyncio.create_task(doomed.vanish()))
            await asyncio.Event().wait()

        doomed.on_call = vanish
        waiting = asyncio.create_task(lane.compute(0, HIDDEN, routing))
        await eventually(lambda: bool(doomed.calls))
        await last.start(lane.registry)
        try:
            assert torch.equal(await waiting, fake_layer(0, HIDDEN, routing))
        finally:
            await last.vanish()


@pytest.mark.usefixtures("short_limits")
async def test_a_request_that_ends_does_not_wait_for_a_late_call():
    """Once a call is late, the step asks whether a request must end; then the call is cancelled."""

    def check() -> None:
        raise Cancelled("the client closed the stream")

    hung = holder("a")
    async with hop_over(hung) as lane:
        hang(hung)
        with pytest.raises(Cancelled):
            await lane.compute(0, HIDDEN, ROUTING, check=check)
        await eventually(lambda: len(hung.cancelled) == 1)


async def test_a_probe_is_bridged_at_once(monkeypatch: pytest.MonkeyPatch):
    """The call that probes an avoided replica costs the layer hardly any time if the replica still hangs."""
    monkeypatch.setattr("moiety.router.hop.call_limits.FLOOR_S", 30.0)
    hung, other = holder("a"), holder("b")
    async with hop_over(hung, other, hedge_after_s=0.02, retry_budget=0.0) as lane:
        hang(hung)
        spend_hedges(lane)
        lane.fleet.breakers.failed("a", time.monotonic() - 10.0, "known", certain=True)
        began = time.monotonic()
        await assert_layer(lane)
        assert len(hung.calls) == 1, "this was the probe"
        assert time.monotonic() - began < 10.0


def test_the_limit_follows_cost_and_queue():
    """The limit is FACTOR times the predicted batch and the replica's last queue and batch, at least FLOOR_S."""
    costs = CostFit(1000, clock=iter(range(1000)).__next__)
    limits = CallLimits(costs, experts=8)
    assert limits.of("a", "slow", 100) == FLOOR_S
    for rows in (10, 20, 40, 80) * 20:
        reply = ForwardResponse(batch_rows=rows, activated_experts=8, compute_ms=100.0 * rows)
        costs.record("slow", reply, took_s=1e6)
    costs.reading()
    assert limits.of("a", "slow", 100) == pytest.approx(FACTOR * 10.0, rel=0.1)
    assert limits.of("a", "other kind", 100) == FLOOR_S
    limits.record("a", ForwardResponse(queue_ms=15_000.0, compute_ms=5_000.0), took_s=30.0)
    assert limits.of("a", "other kind", 1) == FACTOR * 20.0
    limits.record("a", ForwardResponse(queue_ms=float("nan")), took_s=2.0)
    assert limits.of("a", "other kind", 1) == FACTOR * 2.0
    limits.keep({"b"})
    assert limits.of("a", "other kind", 1) == FLOOR_S


def test_each_kind_of_replica_has_its_own_cost():
    """A fast and a slow kind do not blur each other's fit; the kinds that are remembered are bounded."""
    costs = CostFit(1000, clock=iter(range(100_000)).__next__)
    for rows in (10, 20, 40, 80) * 20:
        for kind, ms_per_row in (("fast", 0.1), ("slow", 100.0)):
            compute_ms = ms_per_row * rows
            costs.record(kind, ForwardResponse(batch_rows=rows, activated_experts=1, compute_ms=compute_ms), took_s=1e6)
    by_kind = {fitted.kind: fitted for fitted in costs.reading()}
    assert by_kind["fast"].error < 0.05
    assert by_kind["slow"].error < 0.05
    assert costs.predict("slow", 1, 100) == pytest.approx(1000 * costs.predict("fast", 1, 100), rel=0.1)
    for number in range(100):
        costs.record(f"kind {number}", ForwardResponse(batch_rows=1, activated_experts=1, compute_ms=1.0), took_s=1.0)
    assert len(costs.reading()) <= 16
