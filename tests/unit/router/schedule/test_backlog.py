"""What many waiting requests cost the running ones: nothing."""

from __future__ import annotations

import time

import pytest
from engine_support import CountingModel, engine_of, submit

from moiety.core.sampling import Sampling
from moiety.errors import Cancelled, DeadlineExceeded
from moiety.router.engine import Engine
from moiety.wire.deadline import Deadline

RUNNING = Sampling(max_tokens=300, ignore_eos=True)


def backlogged(waiting: int) -> Engine:
    """Returns an engine that runs four requests while `waiting` others, of several tenants and priorities, wait."""
    engine = engine_of(CountingModel(), slots=4, queue_limit=100_000, blocks=400)
    for first in range(4):
        submit(engine, [first], sampling=RUNNING)
    engine.step()
    for number in range(waiting):
        deadline = Deadline.after(60.0 + number % 7)
        submit(engine, [1], sampling=RUNNING, tenant=f"t{number % 50}", priority=number % 3, deadline=deadline)
    engine.step()
    return engine


def step_s(engine: Engine) -> float:
    """Returns the seconds of the shortest of 60 steps, in which a waiting request is cancelled before every second one."""
    times = []
    for number in range(60):
        if number % 2:
            cancelled, listener = submit(engine, [2], sampling=RUNNING)
            engine.cancel(cancelled)
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
        assert number % 2 == 0 or isinstance(listener.end.error, Cancelled)
    return min(times)


def test_a_step_takes_no_longer_because_20000_requests_wait():
    """The shortest step with 20,000 waiting requests takes less than twice that with ten."""
    few, many = backlogged(10), backlogged(20_000)
    assert many.load.waiting == 20_000
    assert step_s(many) < 2 * step_s(few)


@pytest.mark.parametrize("number", [0, 7, 19])
def test_a_late_or_cancelled_request_leaves_the_middle_of_the_queue(number: int):
    """It ends at the next step, wherever it waits, and the others stay in order."""
    engine = engine_of(CountingModel(), slots=1, queue_limit=100)
    submit(engine, [1], max_tokens=2)
    engine.step()
    late, gone = Deadline.after(0.0), {number: DeadlineExceeded, (number + 1) % 20: Cancelled}
    order: list[int] = []
    requests = [
        submit(engine, [2], max_tokens=1, deadline=late if n == number else Deadline(), tenant="t") for n in range(20)
    ]
    for n, (sequence, listener) in enumerate(requests):
        sequence.emit = lambda emitted, n=n, listener=listener: (order.append(n), listener(emitted))
    engine.cancel(requests[(number + 1) % 20][0])
    engine.step()
    assert sorted(order) == sorted(gone)
    assert {n: type(requests[n][1].end.error) for n in gone} == gone
    while engine.step():
        pass
    assert order[2:] == [n for n in range(20) if n not in gone]
