"""Overload is not "no live replica holds": a layer waits for room, and its error says so."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch
from hop_scenarios import EXPECTED, HIDDEN, ROUTING, SHAPE, answers, assert_layer, holder, hop_over

from moiety.core.expert_backend import CallClass
from moiety.core.replica import Transport
from moiety.errors import HopFailed, NoHolder, ResourceExhausted
from moiety.internal.v1 import experts_pb2
from moiety.router.step_context import StepContext
from moiety.telemetry.tracing import NO_SPAN
from moiety.testing import LoopbackHop, eventually
from moiety.wire.frames import ForwardCall

pytestmark = pytest.mark.usefixtures("each_transport")

OVERLOADED = experts_pb2.OUTCOME_OVERLOADED


async def test_overload_is_an_error_of_its_own():
    """When all holders stay overloaded, the error says so with a retry delay, and no expert was reported missing."""
    both = [holder(name, on_call=answers(OVERLOADED)) for name in ("a", "b")]
    async with hop_over(*both, expert_wait_s=0.3) as lane:
        why = r"all holders of expert\(s\) \[.*\] of MoE layer 0 are overloaded; waited \d\.\d s for room; retry"
        with pytest.raises(HopFailed, match=why) as failed:
            await lane.compute(0, HIDDEN, ROUTING)
        assert isinstance(failed.value.cause, ResourceExhausted)
        assert not lane.reported_missing
        assert not lane.fleet.breakers.open, "an overloaded replica is not broken"


async def test_only_missing_experts_are_reported():
    """One holder is overloaded, another has left: only the experts of the latter are reported and named."""
    async with hop_over(holder("a", "0-2", on_call=answers(OVERLOADED)), expert_wait_s=0.3) as lane:
        with pytest.raises(HopFailed) as failed:
            await lane.compute(0, HIDDEN, ROUTING)
        assert isinstance(failed.value.cause, NoHolder)
        assert failed.value.cause.experts == [3]
        assert {tuple(experts) for _, experts in lane.reported_missing} == {(3,)}


async def test_a_failing_holder_does_not_end_rows_that_wait_for_room():
    """One of two holders fails, the other is overloaded for a while: the rows wait for it."""
    busy = holder("b")

    async def refuse_first(_call: ForwardCall) -> experts_pb2.Outcome | None:
        return OVERLOADED if len(busy.calls) < 4 else None

    busy.on_call = refuse_first
    async with hop_over(holder("a", on_call=answers(experts_pb2.OUTCOME_FAILED)), busy) as lane:
        await assert_layer(lane)


async def test_an_answer_frees_room_at_once(monkeypatch: pytest.MonkeyPatch):
    """Rows for which the segment is full go out when an answer frees it, not when a timer ends."""
    monkeypatch.setattr("moiety.wire.transports.shm_connection.SEGMENT_BYTES", 512)
    monkeypatch.setattr("moiety.router.hop.call.MAX_CALL_BYTES", 4 * SHAPE.mlp.hidden)
    monkeypatch.setattr("moiety.router.hop.parked.POLL_S", 60.0)
    async with hop_over(holder("a"), transport=Transport.SHM) as lane:
        began = time.monotonic()
        assert torch.equal(await lane.compute(0, HIDDEN, ROUTING), EXPECTED)
        assert time.monotonic() - began < 10.0


def submit(lane: LoopbackHop) -> asyncio.Future[object]:
    """Submits a layer on the engine's thread, and never asks for its result."""
    step = StepContext(CallClass.DECODE, NO_SPAN, lambda: None, lambda *missing: lane.reported_missing.append(missing))
    backend = lane.hop.begin_step(step)
    return asyncio.get_running_loop().run_in_executor(lane.thread, backend.submit, 0, HIDDEN, ROUTING)


async def test_a_layer_that_nobody_waits_for_is_given_up_with_the_next_step():
    """What fails between `submit` and `result` leaves nothing behind: calls are cancelled, parked rows are not sent."""
    hung, late = holder("a", "0-2"), holder("late", "3")
    hung.on_call = lambda _call: asyncio.Event().wait()
    async with hop_over(hung) as lane:
        await submit(lane)
        await eventually(lambda: len(hung.calls) == 1)
        lane.hop.begin_step(StepContext(CallClass.DECODE, NO_SPAN, lambda: None, lambda *_: None))
        await eventually(lambda: len(hung.cancelled) == 1)
        await late.start(lane.registry)
        try:
            await eventually(lambda: "late" in lane.fleet.table.replicas)
            lane.hop.poll()
            assert not late.calls
        finally:
            await late.vanish()
