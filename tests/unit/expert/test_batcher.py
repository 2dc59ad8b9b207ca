"""The queue in front of the device: order, batches, and its bound."""

from __future__ import annotations

import threading
import time

import pytest
from expert_support import call_for, waiting_for

from moiety.core.expert_backend import CallClass
from moiety.errors import ResourceExhausted
from moiety.expert.batcher import MAX_BATCH_ROWS, PREFILL_PATIENCE_S, Batcher, QueuedCall

DECODE, PREFILL = CallClass.DECODE, CallClass.PREFILL


def fill(batcher: Batcher, *calls: tuple[CallClass, int]) -> list[QueuedCall]:
    """Queues calls of (class, layer), each 1 ms younger than the one before."""
    queued, now = [], time.monotonic()
    for position, (call_class, layer) in enumerate(calls):
        waiting, _ = waiting_for(call_for([0], layer=layer, call_class=call_class))
        waiting.since = now + position / 1000
        batcher.put(waiting)
        queued.append(waiting)
    return queued


def test_decode_goes_before_prefill_and_the_oldest_layer_first():
    """Decode goes before prefill; within a class the layer whose oldest call has waited longest goes first."""
    batcher = Batcher(16)
    fill(batcher, (PREFILL, 0), (DECODE, 2), (PREFILL, 1), (DECODE, 1), (DECODE, 2))
    taken = [[(w.call.call_class, w.call.layer) for w in batcher.take()] for _ in range(4)]
    assert taken == [[(DECODE, 2), (DECODE, 2)], [(DECODE, 1)], [(PREFILL, 0)], [(PREFILL, 1)]]
    assert len(batcher) == 0


def test_prefill_that_has_waited_long_enough_is_not_starved():
    """Prefill that has waited PREFILL_PATIENCE_S goes before younger decode."""
    batcher = Batcher(16)
    prefill, _ = fill(batcher, (PREFILL, 0), (DECODE, 1))
    prefill.since -= PREFILL_PATIENCE_S
    assert batcher.take() == [prefill]


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


def test_a_full_queue_refuses_with_its_bound():
    """Calls beyond the limit are refused with a retry delay; a place that becomes free is used."""
    batcher = Batcher(2)
    fill(batcher, (DECODE, 0), (DECODE, 0))
    with pytest.raises(ResourceExhausted, match="2 of at most 2 calls") as refused:
        fill(batcher, (DECODE, 0))
    assert refused.value.retry_after_s > 0
    batcher.take()
    fill(batcher, (DECODE, 0))


def test_a_closed_queue_returns_what_is_left():
    """After close, new calls are refused with the reason; `take` returns waiting calls, then empty batches."""
    batcher = Batcher(2)
    queued = fill(batcher, (DECODE, 0))
    batcher.close()
    with pytest.raises(ResourceExhausted, match="shutting down"):
        fill(batcher, (DECODE, 0))
    assert batcher.take() == queued
    assert batcher.take() == []


def test_take_waits_for_work_and_wakes_on_close():
    """`take` blocks while nothing waits; closing ends the wait with an empty batch."""
    batcher, taken = Batcher(2), []
    thread = threading.Thread(target=lambda: taken.append(batcher.take()))
    thread.start()
    batcher.close()
    thread.join(10)
    assert taken == [[]]
