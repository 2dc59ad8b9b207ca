"""Liveness by progress, by a clock of the test's own: hanging and failing is sickness, slowness and rest are not."""

from __future__ import annotations

from collections.abc import Callable

from moiety.core.progress import FACTOR, FIRST_S, FORGET_S, LATE_S, LOOK_S, Progress

LEAST_S = 5.0
STEP = LOOK_S / 4  # how often these tests look


def looked(progress: Progress, since: float, until: float) -> str:
    """Looks regularly from `since` to `until`; returns what the last look found."""
    problem, now = "", since
    while now < until:
        problem = progress.problem(now)
        now += STEP
    return progress.problem(until) or problem


def units(progress: Progress, seconds: float, size: int = 1, count: int = 3) -> float:
    """Does `count` units of work, from time 0; returns the time at their end."""
    now = 0.0
    for _ in range(count):
        progress.begin(now, size)
        now += seconds
        progress.end(now)
    return now


def test_a_worker_without_work_is_well():
    """A worker that has done its work, or never had any, may rest for ever."""
    assert not looked(Progress(1, LEAST_S), 0.0, 1000.0)
    progress = Progress(1, LEAST_S)
    assert not looked(progress, units(progress, 0.1), 1000.0)


def test_a_unit_that_does_not_end_is_sickness_until_it_ends():
    """Beyond the limit the worker is sick, and the reason says how long; once the unit ends it is well."""
    progress = Progress(1, LEAST_S)
    began = units(progress, 0.01)
    progress.begin(began)
    assert not looked(progress, began, began + LEAST_S)
    assert looked(progress, began + LEAST_S, began + LEAST_S + 1.0) == "no progress for 6.0 s, the limit is 5.0 s"
    progress.end(began + 7.0)
    assert not progress.problem(began + 7.0)


def test_failures_in_a_row_count_however_long_each_takes():
    """Units that fail after FORGET_S, each begun when the one before has failed, are failures in a row."""
    progress = Progress(2, LEAST_S)
    progress.begin(0.0)
    progress.fail(FORGET_S + 1.0)
    progress.begin(FORGET_S + 2.0)
    progress.fail(2 * FORGET_S + 4.0)
    assert progress.problem(2 * FORGET_S + 4.0) == "2 units of work failed in a row"


def test_what_units_have_cost_is_the_measure():
    """A worker whose units take 3 s may take some times that, and one whose unit is larger more in proportion."""
    progress = Progress(1, LEAST_S)
    began = units(progress, 3.0, size=8)
    progress.begin(began, 8)
    assert not looked(progress, began, began + FACTOR * 3.0)
    assert looked(progress, began + FACTOR * 3.0, began + FACTOR * 3.0 + STEP)
    progress.end(began + 30.0)
    began += 30.0
    progress.begin(began, 8 * 64)
    assert not looked(progress, began, began + 64 * FACTOR * 3.0)


def test_the_first_unit_has_more_time():
    """The first unit compiles kernels and pages weights in: nothing has shown yet how long units take."""
    progress = Progress(1, LEAST_S)
    progress.begin(0.0)
    assert not looked(progress, 0.0, FIRST_S)
    assert looked(progress, FIRST_S, FIRST_S + STEP)


def test_one_slow_unit_is_forgotten():
    """A unit that once took long does not raise the limit for ever."""
    progress = Progress(1, LEAST_S)
    now = units(progress, 20.0, count=1)
    for _ in range(3):  # the span of the slow unit, the next one, and the beginning of a third
        now += LATE_S + 1.0
        progress.begin(now)
        progress.end(now + 0.1)
    progress.begin(now)
    assert looked(progress, now, now + LEAST_S + STEP)


def test_a_worker_that_waits_for_others_is_not_judged():
    """Time between `pause` and the next `begin` is not the worker's, however long it is."""
    progress = Progress(1, LEAST_S)
    began = units(progress, 0.01)
    progress.begin(began)
    progress.pause(began + 1.0)
    assert not looked(progress, began, began + 1000.0)


def test_a_judge_that_was_stopped_starts_over():
    """After a pause of the whole process nobody is sick at once; who still does not get on is found later."""
    progress = Progress(1, LEAST_S)
    began = units(progress, 0.01)
    progress.begin(began)
    assert not looked(progress, began, began + 1.0)
    woken = began + 500.0
    assert not progress.problem(woken)
    assert not looked(progress, woken, woken + LEAST_S)
    assert looked(progress, woken + LEAST_S, woken + LEAST_S + STEP)


def failing(times: int, succeed: Callable[[Progress], None] = lambda _: None) -> Progress:
    """Returns a worker of which three failures in a row are sickness, after `times` failures, then `succeed`."""
    progress = Progress(3, LEAST_S)
    for failure in range(times):
        progress.begin(0.1 * failure)
        progress.fail(0.1 * failure)
    succeed(progress)
    return progress


def test_failures_in_a_row_are_sickness_and_one_success_ends_it():
    """Two failures are bad luck, three are sickness, and a success afterwards shows that the worker is well."""
    assert not failing(2).problem(1.0)
    assert failing(3).problem(1.0) == "3 units of work failed in a row"
    assert not failing(3, lambda progress: progress.end(0.5)).problem(1.0)
    assert not failing(2, lambda progress: (progress.end(0.5), progress.fail(0.6))).problem(1.0)  # type: ignore[arg-type]


def test_failures_of_long_ago_do_not_count():
    """A worker that nobody has asked since gets another chance."""
    progress = failing(3)
    assert looked(progress, 0.2, FORGET_S)
    assert not progress.problem(FORGET_S + 1.0)
    assert progress.fail(FORGET_S + 2.0)
    assert not progress.problem(FORGET_S + 2.0)


def test_only_the_first_failure_of_a_series_is_worth_a_log_line():
    """`fail` says so, and says so again once the series is over."""
    progress = Progress(3, LEAST_S)
    assert [progress.fail(float(second)) for second in range(5)] == [True, False, False, False, False]
    progress.end(5.0)
    assert not progress.fail(6.0)
    assert progress.fail(6.0 + FORGET_S + 1.0)
