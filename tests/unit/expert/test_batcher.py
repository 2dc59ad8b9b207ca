"""The waiting room: who goes first, who shares a batch, and when it is full."""

from __future__ import annotations

import threading
import time

import pytest
from expert_support import call_for, waiting_for

from moiety.core.expert_backend import CallClass
from moiety.errors import ResourceExhausted
from moiety.expert.batcher import MAX_BATCH_ROWS, PREFILL_PATIENCE_S, Batcher, Waiting

DECODE, PREFILL = CallClass.DECODE, CallClass.PREFILL


def fill(batcher: Batcher, *calls: tuple[CallClass, int]) -> list[Waiting]:
    """Queues calls of (class, layer), each a little younger than the one before, and all of them just now."""
    queued, now = [], time.monotonic()
    for place, (call_class, layer) in enumerate(calls):
        waiting, _ = waiting_for(call_for([0], layer=layer, call_class=call_class))
        waiting.since = now + place / 1000
        batcher.put(waiting)
        queued.append(waiting)
    return queued


def test_decode_goes_before_prefill_and_the_oldest_layer_first():
    """Running streams never wait behind somebody's prompt; within a class nobody is overtaken by another layer."""
    batcher = Batcher(16)
    fill(batcher, (PREFILL, 0), (DECODE, 2), (PREFILL, 1), (DECODE, 1), (DECODE, 2))
    taken = [[(w.call.call_class, w.call.layer) for w in batcher.take()] for _ in range(4)]
    assert taken == [[(DECODE, 2), (DECODE, 2)], [(DECODE, 1)], [(PREFILL, 0)], [(PREFILL, 1)]]
    assert len(batcher) == 0


def test_prefill_that_has_waited_long_enough_is_not_starved():
    """A replica that always has decode to do computes a prompt's rows too, once they have been patient."""
    batcher = Batcher(16)
    patient, _ = fill(batcher, (PREFILL, 0), (DECODE, 1))
    patient.since -= PREFILL_PATIENCE_S
    assert batcher.take() == [patient]


def test_calls_for_one_layer_share_a_batch_in_order_of_arrival():
    """Calls of different routers for the same layer are merged; other layers and classes are not."""
    batcher = Batcher(16)
    queued = fill(batcher, (DECODE, 1), (DECODE, 0), (DECODE, 1), (PREFILL, 1), (DECODE, 1))
    assert batcher.take() == [queued[0], queued[2], queued[4]]


def test_a_batch_is_bounded_but_a_big_call_is_never_stuck():
    """Merging stops before MAX_BATCH_ROWS is passed; a single call above it runs alone."""
    batcher = Batcher(16)
    sizes = (MAX_BATCH_ROWS + 1, MAX_BATCH_ROWS - 10, 10, 1)
    for size in sizes:
        batcher.put(waiting_for(call_for([0] * size))[0])
    taken = [[len(waiting.call.experts) for waiting in batcher.take()] for _ in range(3)]
    assert taken == [[sizes[0]], [sizes[1], sizes[2]], [sizes[3]]]


def test_a_full_room_refuses_with_its_bound():
    """Beyond the limit calls are refused, with a hint when to come again; a place that frees is used."""
    batcher = Batcher(2)
    fill(batcher, (DECODE, 0), (DECODE, 0))
    with pytest.raises(ResourceExhausted, match="2 of at most 2 calls") as refused:
        fill(batcher, (DECODE, 0))
    assert refused.value.retry_after_s > 0
    batcher.take()
    fill(batcher, (DECODE, 0))


def test_a_closed_room_hands_out_what_is_left():
    """After close nothing is accepted, and its refusal says why; what waits is still taken, then nothing."""
    batcher = Batcher(2)
    queued = fill(batcher, (DECODE, 0))
    batcher.close()
    with pytest.raises(ResourceExhausted, match="shutting down"):
        fill(batcher, (DECODE, 0))
    assert batcher.take() == queued
    assert batcher.take() == []


def test_take_waits_for_work_and_wakes_on_close():
    """An idle device sleeps; closing ends the wait with an empty batch."""
    batcher, taken = Batcher(2), []
    thread = threading.Thread(target=lambda: taken.append(batcher.take()))
    thread.start()
    batcher.close()
    thread.join(10)
    assert taken == [[]]
