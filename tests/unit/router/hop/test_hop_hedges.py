"""Hedges of slow calls over loopback replicas: when a second replica is called, which one is avoided, and the budget."""

from __future__ import annotations

import asyncio
import time

import pytest
from hop_scenarios import assert_layer, holder, hop_over

from moiety.core.expert_backend import CallClass
from moiety.router.hop.hedging import BURST
from moiety.testing import LoopbackHop, eventually
from moiety.wire.frames import ForwardCall

pytestmark = pytest.mark.usefixtures("each_transport")


def warm(lane: LoopbackHop) -> None:
    """Gives layer 0 a p99 of 0 s, so that hedges fire after `hedge_after_s`."""
    for _ in range(16):
        lane.hop.context.hedging.record_latency(0, CallClass.DECODE, 0.0)


def avoided(lane: LoopbackHop) -> set[str]:
    """Returns the replicas that the router calls only where there is no other holder."""
    return set(lane.fleet.breakers.avoided(time.monotonic()))


async def test_a_hung_replica_is_bridged_and_avoided_until_it_answers():
    """A hedge returns the rows; the hung replica gets no call until its late answer shows that it is alive."""
    released = asyncio.Event()
    hung, other = holder("a"), holder("b")
    async with hop_over(hung, other, hedge_after_s=0.02) as lane:

        async def wait(_call: ForwardCall) -> None:
            await released.wait()

        hung.on_call = wait
        warm(lane)
        await assert_layer(lane)
        assert avoided(lane) == {"a"}
        before = len(hung.calls)
        for _ in range(5):
            await assert_layer(lane)
        assert len(hung.calls) == before
        assert not other.calls[-1].attempt
        released.set()
        await eventually(lambda: not avoided(lane))
        await assert_layer(lane)
        assert len(hung.calls) > before


async def test_a_late_replica_that_is_the_only_holder_is_still_called():
    """A slow holder is better than none."""
    slow = holder("a")
    async with hop_over(slow, holder("b", "0-1")) as lane:
        lane.fleet.breakers.overtaken("a", time.monotonic(), 60.0)
        await assert_layer(lane)
        assert not avoided(lane), "its answer clears it"


async def test_a_replica_that_has_just_answered_is_not_late():
    """A hedge that wins narrowly does not mark the other replica, whose answer has already arrived."""
    async with hop_over(holder("a")) as lane:
        await assert_layer(lane)
        lane.fleet.overtaken("a", 1, 60.0)  # the call that was answered
        assert not avoided(lane)


async def test_hedges_keep_to_their_budget():
    """If all replicas are slow, hedges are at most the burst plus the budgeted fraction of all calls."""
    both = [holder("a"), holder("b")]

    async def slow(_call: ForwardCall) -> None:
        await asyncio.sleep(0.01)

    async with hop_over(*both, hedge_after_s=0.001, hedge_factor=0.0) as lane:  # every hedge is due after 1 ms
        for replica in both:
            replica.on_call = slow
        warm(lane)
        for _ in range(40):
            lane.fleet.breakers.keep(())
            await assert_layer(lane)
        calls = [call for replica in both for call in replica.calls]
        hedges = sum(call.attempt > 0 for call in calls)
        assert 5 <= hedges <= BURST + 0.1 * len(calls)
