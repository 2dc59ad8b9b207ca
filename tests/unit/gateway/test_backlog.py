"""Those who are refused come back one after the other, not all at once."""

from __future__ import annotations

from moiety.gateway.backlog import LEAST_S, MOST_S, Backlog


def test_each_is_told_to_come_after_those_before():
    """Refused together, they are spread over the time that it takes to serve them; who is due is expected no more."""
    now = [0.0]
    backlog = Backlog(lambda: now[0])

    def wait_s(before: int) -> float:
        return 1.0 + before / 2

    assert [backlog.refuse(wait_s) for _ in range(4)] == [1.0, 1.5, 2.0, 2.5]
    now[0] = 1.6
    assert backlog.refuse(wait_s) == 2.0
    now[0] = 10.0
    assert backlog.refuse(wait_s) == 1.0


def test_nobody_is_sent_away_for_good_or_for_nothing():
    """However many were refused, and however soon there is room, the hint is within bounds."""
    backlog = Backlog(lambda: 0.0)
    hints = [backlog.refuse(float) for _ in range(1000)]
    assert (min(hints), max(hints)) == (LEAST_S, MOST_S)
