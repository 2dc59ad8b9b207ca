"""Lies that only a gRPC stream can carry: broken frames, and answers to calls that nobody made."""

from __future__ import annotations

import asyncio

import pytest
from hop_scenarios import HIDDEN, ROUTING, assert_layer, holder, hop_over

from moiety.errors import HopFailed
from moiety.router.hop.breaker import FAILURES
from moiety.router.hop.layer_call import MAX_LOSSES
from moiety.testing import LoopbackHop, eventually
from moiety.wire.transports.connection import MOST_UNASKED


async def serve(lane: LoopbackHop, layers: int) -> None:
    """Asserts that several layers, one after the other, return the expected rows."""
    for _ in range(layers):
        await assert_layer(lane)


async def test_a_replica_whose_connection_breaks_at_every_call_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """It is dialled again, less and less often, and called only when it is probed."""
    liar = holder("a")
    liar.on_reply = lambda _: b"\xff" * 300  # no ForwardResponse
    async with hop_over(liar, holder("b")) as lane:
        for _ in range(50):
            await assert_layer(lane)
            await asyncio.sleep(0.02)
        assert len(liar.calls) <= FAILURES + 2


async def test_the_loss_of_one_replica_counts_once(monkeypatch: pytest.MonkeyPatch):
    """The only holder breaks its connection at each of several calls: its rows wait for it, they are not the cause."""
    monkeypatch.setattr("moiety.router.hop.links.LONGEST_REDIAL_S", 0.02)
    monkeypatch.setattr("moiety.router.hop.links.REDIAL_S", 0.02)
    flaky = holder("a")
    async with hop_over(flaky, expert_wait_s=15.0) as lane:
        flaky.on_reply = lambda frame: frame if len(flaky.calls) > MAX_LOSSES + 1 else b"\xff" * 300
        await assert_layer(lane)
        assert len(flaky.calls) > MAX_LOSSES + 1


async def test_rows_that_break_several_replicas_are_the_cause():
    """After more than MAX_LOSSES replicas were lost with the same rows, these rows fail; the others are not tried."""
    breaking = [holder(str(number)) for number in range(MAX_LOSSES + 2)]
    for replica in breaking:
        replica.on_reply = lambda _: b"\xff" * 300
    async with hop_over(*breaking) as lane:
        with pytest.raises(HopFailed, match=f"{MAX_LOSSES + 1} replicas were lost while computing the same rows"):
            await lane.compute(0, HIDDEN[:1], ROUTING[:1, :1])


async def test_answers_to_calls_that_nobody_made_do_not_break_the_stream():
    """A few are dropped and the replica is used on; a flood ends its stream, and it is left alone."""
    liar = holder("a")
    liar.unasked = 1
    async with hop_over(liar, holder("b")) as lane:
        await serve(lane, 5)
        assert len(liar.calls) >= 3
        assert "a" in lane.fleet.table.replicas
        liar.unasked = 3 * MOST_UNASKED
        await serve(lane, 5)
        await eventually(lambda: lane.fleet.breakers.open == {"a"})
