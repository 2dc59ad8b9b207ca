"""The device thread: right rows for every call, failures that stay within their batch, experts swapped under load."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from expert_support import Answers, MakeRuntime, call_for, plainly, rows_for, tensor_of, waiting_for, weights_of

from moiety.core.experts import ExpertSet
from moiety.errors import DeadlineExceeded, MoietyError, NotHeld, ResourceExhausted
from moiety.expert.batcher import Computed, QueuedCall
from moiety.wire.deadline import Deadline

ALL = ExpertSet.uniform(3, range(6))


def submit(runtime, experts, **options) -> Answers:
    """Queues one call; returns the collector of its answer."""
    waiting, answers = waiting_for(call_for(experts, **options))
    runtime.submit(waiting)
    return answers


def test_merged_calls_get_their_own_rows_in_their_own_order(make_runtime: MakeRuntime):
    """Each call of a batch gets the rows that it would get alone, in the order of its experts."""
    runtime = make_runtime(ALL, start=False)
    wanted = ([5, 0, 5, 2], [2, 0], [0], [])
    answers = [submit(runtime, experts) for experts in wanted]
    runtime.start()
    for experts, answer in zip(wanted, answers, strict=True):
        computed = answer.one()
        assert isinstance(computed, Computed)
        assert computed.batch_rows == 7
        assert computed.activated_experts == 3
        if experts:
            torch.testing.assert_close(tensor_of(computed), plainly(experts, rows_for(len(experts))))


def test_a_call_of_no_rows_is_answered_with_none(make_runtime: MakeRuntime):
    """A call of zero rows, alone in a batch, is answered without an error."""
    computed = submit(make_runtime(ALL), []).one()
    assert isinstance(computed, Computed)
    assert len(computed.picked.order) == 0


def test_a_failing_batch_fails_only_its_own_calls(make_runtime: MakeRuntime):
    """Calls of the batch that raised get the error; calls of other and of later batches succeed."""
    broken = {(0, 1)}

    def load(held):  # an expert whose matrices do not fit the rows
        return {
            pair: weights_of(pair) if pair not in broken else type(weights_of(pair))(torch.ones(3, 5), torch.ones(5, 2))
            for pair in held
        }

    runtime = make_runtime(ALL, start=False, load=load)
    failing, other = submit(runtime, [1]), submit(runtime, [1], layer=1)
    runtime.start()
    assert isinstance(failing.one(), MoietyError)
    assert "log says why" in str(failing.one())
    assert isinstance(other.one(), Computed)
    assert isinstance(submit(runtime, [0]).one(), Computed)
    assert runtime.alive


def test_a_caller_that_is_gone_harms_no_other_call(make_runtime: MakeRuntime):
    """A `done` that raises, because its loop is closed, ends neither the thread nor other calls of the batch."""
    runtime = make_runtime(ALL, start=False)

    def gone(_result) -> None:
        raise RuntimeError("Event loop is closed")

    runtime.submit(QueuedCall(call_for([0]), gone))
    mate = submit(runtime, [0])
    runtime.start()
    assert isinstance(mate.one(), Computed)
    assert isinstance(submit(runtime, [1]).one(), Computed)


def test_a_call_for_a_missing_expert_is_refused_whole(make_runtime: MakeRuntime):
    """One missing (layer, expert) refuses the call before it is queued; the error names what is missing."""
    runtime = make_runtime(ExpertSet.uniform(3, [0, 1]), start=False)
    with pytest.raises(NotHeld, match=r"layer 2: expert\(s\) \[4, 5\]"):
        submit(runtime, [0, 4, 1, 5], layer=2)
    with pytest.raises(NotHeld, match="layer 7"):
        submit(runtime, [0], layer=7)
    assert runtime.idle


def test_only_new_experts_are_read(make_runtime: MakeRuntime):
    """A new placement reads only the experts that it adds, layer by layer, not those held or still leaving."""
    reads: list[ExpertSet] = []

    def load(held):
        reads.append(held)
        return {pair: weights_of(pair) for pair in held}

    runtime = make_runtime(ExpertSet.parse("0-1:0-1"), start=False, load=load)
    reads.clear()
    runtime.hold(ExpertSet.parse("0-1:1-2;2:0"), 1)
    assert list(map(str, reads)) == ["0:2", "1:2", "2:0"]
    reads.clear()
    runtime.hold(ExpertSet.parse("0:0-1"), 2)
    assert not reads


def test_leaving_experts_are_computed_until_they_are_dropped(make_runtime: MakeRuntime):
    """Calls for an expert that a placement removes are computed, and it is not dropped while one is unanswered."""
    runtime = make_runtime(ALL, start=False)
    runtime.hold(ExpertSet.uniform(3, range(5)), epoch=3)
    assert (runtime.holding.held, runtime.holding.leaving) == (
        ExpertSet.uniform(3, range(5)),
        ExpertSet.uniform(3, [5]),
    )
    late, other = submit(runtime, [0, 5]), submit(runtime, [1])
    assert not runtime.drop_leaving()
    runtime.start()
    torch.testing.assert_close(tensor_of(late.one()), plainly([0, 5], rows_for(2)))
    assert isinstance(other.one(), Computed)
    runtime.stop(10)
    assert runtime.drop_leaving()
    assert len(runtime.holding.leaving) == 0
    with pytest.raises(NotHeld, match=r"\[5\].*epoch 3"):
        submit(runtime, [5])


def test_a_placement_that_cannot_be_read_changes_nothing(make_runtime: MakeRuntime):
    """Where reading fails half-way, the replica still holds the old experts under the old epoch."""

    def load(held):
        if 1 in held.by_layer and held.layer(1) & {5}:
            raise OSError("the disk is gone")
        return {pair: weights_of(pair) for pair in held}

    runtime = make_runtime(ExpertSet.uniform(3, [0, 1]), load=load)
    with pytest.raises(OSError, match="gone"):
        runtime.hold(ExpertSet.uniform(3, [0, 5]), epoch=1)
    assert (runtime.holding.held, runtime.holding.epoch) == (ExpertSet.uniform(3, [0, 1]), 0)
    assert isinstance(submit(runtime, [0, 1], layer=2).one(), Computed)


def test_an_expired_call_never_reaches_the_device(make_runtime: MakeRuntime):
    """A call whose deadline passed in the queue gets DeadlineExceeded; the other calls of the batch run."""
    runtime = make_runtime(ALL, start=False)
    late, good = submit(runtime, [0], deadline=Deadline.after(0.0)), submit(runtime, [0])
    runtime.start()
    assert isinstance(late.one(), DeadlineExceeded)
    assert good.one().batch_rows == 1


def test_the_queue_is_bounded(make_runtime: MakeRuntime):
    """A call beyond queue_calls is refused at once and does not count as unanswered."""
    runtime = make_runtime(ALL, start=False, queue_calls=2)
    answers = [submit(runtime, [0]) for _ in range(2)]
    with pytest.raises(ResourceExhausted, match="2 of at most 2"):
        submit(runtime, [0])
    runtime.start()
    for answer in answers:
        assert isinstance(answer.one(), Computed)
    runtime.stop(10)
    assert runtime.idle


def test_idle_means_answered(make_runtime: MakeRuntime):
    """A replica is not idle while a call waits, is computed, or has no answer yet."""
    runtime = make_runtime(ALL, start=False)
    seen: list[bool] = []
    assert runtime.idle
    runtime.submit(QueuedCall(call_for([0]), lambda _: seen.append(runtime.idle)))
    assert not runtime.idle
    runtime.start()
    runtime.stop(10)
    assert seen == [False]
    assert runtime.idle


def test_stopping_finishes_what_is_queued(make_runtime: MakeRuntime):
    """Calls that were accepted before the stop are answered."""
    runtime = make_runtime(ALL, start=False)
    answers = [submit(runtime, [expert], layer=layer) for expert in range(6) for layer in range(3)]
    runtime.start()
    runtime.stop(10)
    assert not runtime.alive
    assert all(isinstance(answer.one(), Computed) for answer in answers)


def test_pacing_shows_in_the_load(make_runtime: MakeRuntime):
    """A replica paced to 100 rows a second takes 0.1 s for 10 rows, and reports itself busy that long."""
    runtime = make_runtime(ALL, capacity=100.0)
    runtime.load_since_last()
    began = time.monotonic()
    submit(runtime, [0] * 10).one()
    took = time.monotonic() - began
    load = runtime.load_since_last()
    assert took >= 0.1
    assert load.busy > 0.5
    assert load.rows_per_s == pytest.approx(10 / took, rel=0.5)
    assert load.calls_per_s == pytest.approx(1 / took, rel=0.5)
    assert runtime.load_since_last().busy == 0.0


def test_the_wait_of_a_call_begins_when_it_was_sent(make_runtime: MakeRuntime):
    """The wait of a call through shared memory includes the time before the busy device thread reads it."""
    runtime = make_runtime(ALL, capacity=50.0)
    busy, late = Answers(), Answers()

    def send_another(result) -> None:
        # Called when the first batch is done: submits a call that was sent while that batch was computed.
        call = call_for([0])
        call.sent = time.monotonic() - 0.1
        busy(result)
        runtime.submit(QueuedCall(call, late))

    runtime.submit(QueuedCall(call_for([0] * 10), send_another))  # 0.2 s
    assert isinstance(busy.one(), Computed)
    assert late.one().queue_ms >= 100
    assert runtime.load_since_last().queue_wait_ms >= 50
    assert submit(runtime, [0]).one().queue_ms < 50


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no batch scheduling")
def test_a_replica_does_not_preempt_the_router_that_rings_it(make_runtime: MakeRuntime):
    """The computing thread, and no other thread of the process, is scheduled as a batch job."""
    assert isinstance(submit(make_runtime(ALL), [0]).one(), Computed)
    policies = {thread.name: os.sched_getscheduler(thread.native_id) for thread in threading.enumerate()}
    assert policies.pop("expert-runtime") == os.SCHED_BATCH
    assert os.SCHED_BATCH not in policies.values()
