"""When the breaker of a replica opens, when it is probed, and when it closes. The clock is an argument."""

from __future__ import annotations

import logging

import pytest

from moiety.router.hop.breaker import DELAY_S, FAILURES, LONGEST_DELAY_S, REST_S, STEADY_S, STUCK_LIMITS, Breakers


def opened(now: float = 0.0) -> Breakers:
    """Returns breakers of which that of "a" has opened at `now`."""
    breakers = Breakers()
    breakers.failed("a", now, "broken", certain=True)
    return breakers


def test_failures_in_a_row_open_it():
    """FAILURES failures without a success between them open a breaker, fewer do not."""
    breakers = Breakers()
    for _ in range(5):
        for _ in range(FAILURES - 1):
            breakers.failed("a", 0.0, "broken")
        assert not breakers.avoided(0.0)
        breakers.succeeded("a", 0.0)
    for _ in range(FAILURES):
        breakers.failed("a", 0.0, "broken")
    assert breakers.avoided(0.0) == breakers.open == {"a"}


def test_a_proof_opens_it_at_once():
    """What proves a sick device needs no second time."""
    assert opened().open == {"a"}


def test_one_call_probes_it_and_delays_grow():
    """After each delay one call may go out; the next delay is twice as long, up to a bound."""
    breakers, now, delay_s = opened(), 0.0, DELAY_S
    for _ in range(8):
        assert breakers.avoided(now + 0.99 * delay_s) == {"a"}
        now += delay_s
        assert not breakers.avoided(now)
        assert breakers.sent("a", now), "this call is the probe"
        assert breakers.avoided(now) == {"a"}, "no second call goes out while the first is on its way"
        assert not breakers.sent("a", now)
        breakers.failed("a", now, "still broken")
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)
    assert breakers.changes == 1


def test_a_good_answer_closes_it_and_is_remembered_for_a_while():
    """It opens again with a longer delay if it fails soon after; after STEADY_S everything is forgotten."""
    breakers = opened()
    breakers.succeeded("a", 1.0)
    assert not breakers.open
    breakers.failed("a", 2.0, "broken", certain=True)
    assert breakers.avoided(2.0 + 1.5 * DELAY_S) == {"a"}
    breakers.succeeded("a", 5.0)
    assert not breakers.avoided(5.0 + STEADY_S)
    breakers.failed("a", 100.0, "broken", certain=True)
    assert not breakers.avoided(100.0 + DELAY_S)


def test_a_late_replica_is_avoided_until_it_answers_anything():
    """A replica that was overtaken is not accused: any answer makes it as good as before."""
    breakers = Breakers()
    breakers.overtaken("a", 0.0, limit_s=1.0)
    assert breakers.avoided(0.5) == {"a"}
    assert not breakers.open
    breakers.answered("a", 0.6)
    assert not breakers.avoided(0.6)
    assert breakers.changes == 0


def test_a_replica_that_stays_silent_counts_as_stuck():
    """After STUCK_LIMITS limits without an answer the breaker opens; then it is probed, and any answer closes it."""
    breakers = Breakers()
    breakers.overtaken("a", 0.0, limit_s=1.0)
    breakers.avoided(STUCK_LIMITS)
    assert breakers.open == {"a"}
    assert breakers.sent("a", STUCK_LIMITS + DELAY_S)
    breakers.overtaken("a", STUCK_LIMITS + DELAY_S, limit_s=1.0)
    assert breakers.avoided(STUCK_LIMITS + 2 * DELAY_S) == {"a"}
    breakers.answered("a", 10.0)
    assert not breakers.open


def test_an_answer_that_is_not_good_does_not_close_what_failures_opened():
    """A replica that answers with errors is not stuck, and not well either."""
    breakers = opened()
    breakers.answered("a", 0.1)
    assert breakers.open == {"a"}


def test_an_overloaded_replica_rests_for_a_moment():
    """It is avoided for longer each time it refuses, and never counted as broken."""
    breakers = Breakers()
    breakers.overloaded("a", 0.0)
    breakers.overloaded("a", 0.0)  # refused together
    assert breakers.avoided(0.9 * REST_S) == {"a"}
    assert not breakers.avoided(REST_S)
    breakers.overloaded("a", REST_S)
    assert breakers.avoided(2.5 * REST_S) == {"a"}
    breakers.succeeded("a", 2.5 * REST_S)
    assert not breakers.avoided(2.5 * REST_S)
    assert not breakers.open


def test_a_replica_that_the_registry_lists_as_sick_is_avoided():
    """No call needs to fail first, and what it returns proves nothing about another replica."""
    breakers = Breakers()
    breakers.sick = frozenset({"a"})
    assert breakers.avoided(0.0) == {"a"}
    assert not breakers.closed("a")
    assert breakers.closed("b")


def test_one_line_is_logged_for_each_change(caplog: pytest.LogCaptureFixture):
    """A replica that fails a thousand calls is logged once when it opens and once when it closes."""
    caplog.set_level(logging.INFO, logger="moiety.router.hop.breaker")
    breakers = Breakers()
    for number in range(1000):
        breakers.failed("a", number / 1000, "broken")
    breakers.succeeded("a", 2.0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert f"{FAILURES} failures in a row, last: broken" in caplog.text
    assert breakers.changes == 2


def test_a_replica_that_has_left_is_forgotten():
    """Only replicas that are listed are remembered."""
    breakers = opened()
    breakers.keep({"b"})
    assert not breakers.open
