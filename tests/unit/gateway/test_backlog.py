"""Refused requests return one after the other, not all at once."""

from __future__ import annotations

from moiety.gateway.routers.backlog import LEAST_S, MOST_S, Backlog


def test_each_refusal_is_expected_after_the_earlier_ones():
    """Retry delays grow with the requests still expected; a request whose delay has passed is no longer expected."""
    now = [0.0]
    backlog = Backlog(lambda: now[0])

    def wait_s(before: int) -> float:
        return 1.0 + before / 2

    assert [backlog.refuse(wait_s) for _ in range(4)] == [1.0, 1.5, 2.0, 2.5]
    now[0] = 1.6
    assert backlog.refuse(wait_s) == 2.0
    now[0] = 10.0
    assert backlog.refuse(wait_s) == 1.0


def test_the_retry_delay_is_bounded():
    """The retry delay lies from LEAST_S to MOST_S, for any number of refusals and any predicted wait."""
    backlog = Backlog(lambda: 0.0)
    hints = [backlog.refuse(float) for _ in range(1000)]
    assert (min(hints), max(hints)) == (LEAST_S, MOST_S)
