"""The retry delay of refused requests, from the recent admission rate."""

from __future__ import annotations

import pytest

from moiety.router.schedule.retry_hint import AdmissionRate


@pytest.mark.parametrize(
    ("times", "now", "expected"),
    [
        ([], 5.0, 1.0),  # no admission was observed yet
        ([5.0], 5.0, 1.0),
        ([0.0, 1.0, 2.0, 3.0], 4.0, 50.0),  # one a second: half of 100 start in 50 s
        ([i / 100 for i in range(100)], 1.0, 0.5),  # one hundred a second
        ([i / 10_000 for i in range(64)], 0.0064, 0.05),  # the lower bound
        ([0.0], 1000.0, 60.0),  # the upper bound
    ],
)
def test_the_retry_delay_follows_the_recent_rate(times: list[float], now: float, expected: float):
    """The delay is the time in which half of the waiting requests start."""
    rate = AdmissionRate()
    for time in times:
        rate.note(time)
    assert rate.retry_after(100, now) == pytest.approx(expected, rel=0.05)
