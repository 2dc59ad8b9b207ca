"""Replicas that answer wrongly: their rows are computed elsewhere, they are called less and less, and nothing breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import torch
from hop_scenarios import HIDDEN, ROUTING, answers, assert_layer, holder, hop_over

from moiety.errors import HopFailed
from moiety.internal.v1 import experts_pb2
from moiety.router.hop.breaker import FAILURES
from moiety.testing import LoopbackHop, eventually

pytestmark = pytest.mark.usefixtures("each_transport")

LAYERS = 12


def changed(change: Callable[[experts_pb2.ForwardResponse], None]) -> Callable[[bytes], bytes]:
    """An `on_reply` that changes each reply."""

    def on_reply(frame: bytes) -> bytes:
        reply = experts_pb2.ForwardResponse.FromString(frame)
        reply.ClearField("payload_bytes")
        change(reply)
        return reply.SerializeToString()

    return on_reply


def fill(value: float) -> Callable[[bytes], bytes]:
    """An `on_reply` whose rows have `value` in every element."""

    def change(reply: experts_pb2.ForwardResponse) -> None:
        rows = torch.full((len(reply.payload) // 4,), value)
        reply.payload = rows.numpy().tobytes()

    return changed(change)


def rows_lost(reply: experts_pb2.ForwardResponse) -> None:
    """Leaves out the rows."""
    reply.payload = b""


def one_row_more(reply: experts_pb2.ForwardResponse) -> None:
    """Adds a row of zeros."""
    reply.payload += bytes(32)


def an_unknown_outcome(reply: experts_pb2.ForwardResponse) -> None:
    """Answers with an outcome that this version does not know."""
    reply.outcome, reply.payload = 99, b""  # type: ignore[assignment]


LIES = {
    "NaN": fill(float("nan")),
    "Inf": fill(float("-inf")),
    "an OK without rows": changed(rows_lost),
    "a row too many": changed(one_row_more),
    "an unknown outcome": changed(an_unknown_outcome),
}


async def serve(lane: LoopbackHop, layers: int = LAYERS) -> None:
    """Asserts that several layers, one after the other, return the expected rows."""
    for _ in range(layers):
        await assert_layer(lane)


@pytest.mark.parametrize("lie", LIES)
async def test_a_liar_beside_another_holder_costs_a_few_calls(lie: str):
    """Every layer returns the right rows, and after FAILURES lies, or one proof, the liar is left alone."""
    liar = holder("a")
    liar.on_reply = LIES[lie]
    async with hop_over(liar, holder("b")) as lane:
        await serve(lane)
        assert 1 <= len(liar.calls) <= FAILURES + 2, "those that opened the breaker, and probes on a slow machine"
        assert lane.fleet.breakers.open == {"a"}


async def test_a_liar_is_used_again_once_it_is_honest():
    """A probe finds out that a replica has recovered."""
    liar = holder("a")
    liar.on_reply = LIES["NaN"]
    async with hop_over(liar, holder("b")) as lane:
        await serve(lane)
        liar.on_reply = bytes
        async with asyncio.timeout(10):
            while lane.fleet.breakers.open:
                await assert_layer(lane)
        before = len(liar.calls)
        await assert_layer(lane)
        assert len(liar.calls) > before


@pytest.mark.parametrize("outcome", [experts_pb2.OUTCOME_NOT_HELD, experts_pb2.OUTCOME_WRONG_SYSTEM])
async def test_a_lasting_refuser_costs_no_describe_per_call(outcome: experts_pb2.Outcome):
    """A replica that says that it holds experts, and refuses calls for them, is soon neither called nor asked."""
    refuser = holder("a", on_call=answers(outcome))
    async with hop_over(refuser, holder("b")) as lane:
        asked = refuser.describes
        await serve(lane, 40)
        assert len(refuser.calls) <= FAILURES + 2, "those that opened the breaker, and probes on a slow machine"
        assert refuser.describes - asked <= 3
    only = holder("a", on_call=answers(outcome))
    async with hop_over(only, expert_wait_s=0.8) as lane:
        asked = only.describes
        with pytest.raises(HopFailed):
            await lane.compute(0, HIDDEN, ROUTING)
        assert len(only.calls) > only.describes - asked
        assert only.describes - asked <= 5, (
            "the only holder is called again and again, and asked after 0.25 s, 0.5 s, 1 s"
        )


async def test_times_that_cannot_be_do_not_reach_the_cost_model():
    """NaN and times that are longer than the router waited are left out of the fit, and the rows count as usual."""
    liar = holder("a")

    async with hop_over(liar) as lane:
        for milliseconds in (float("nan"), float("inf"), -1.0, 1e9):

            def lie(reply: experts_pb2.ForwardResponse, milliseconds: float = milliseconds) -> None:
                reply.queue_ms = reply.compute_ms = milliseconds
                reply.batch_rows, reply.activated_experts = 6, 4

            liar.on_reply = changed(lie)
            await serve(lane, 2)
            await asyncio.sleep(0.02)  # between two samples
        assert lane.hop.context.costs.reading() == ()
        assert lane.hop.context.limit_s("a", 6) < 10
        assert not lane.fleet.breakers.avoided(time.monotonic())


async def test_a_description_beyond_the_model_is_refused_and_costs_nothing():
    """A replica that claims 30,000 layers of 3,000 experts is not used; the other holder serves."""
    bomb = holder("a")

    async with hop_over(holder("b")) as lane:
        bomb.described = lambda description: description.MergeFrom(
            experts_pb2.DescribeReplicaResponse(held="0-30000:0-3000")
        )
        await bomb.start(lane.registry)
        try:
            await eventually(lambda: bomb.describes > 1)
            await serve(lane, 3)
            assert not bomb.calls
            assert lane.fleet.table.replicas == ("b",)
        finally:
            await bomb.vanish()
