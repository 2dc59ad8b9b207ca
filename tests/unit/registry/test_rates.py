"""Rows per second from two readings: exact per writer, without spikes when writers start, leave or restart."""

from __future__ import annotations

import numpy as np
from registry_support import demand_of

from moiety.registry.rates import WINDOW_S, RecentRates, rates


def test_each_writer_counts_over_its_own_window() -> None:
    """Writers that flush at different times add up by their own rates."""
    older = {"a": demand_of((10, 0), (0, 4), time=100.0), "b": demand_of((0, 0), (0, 0), time=99.0)}
    newer = {"a": demand_of((30, 0), (0, 4), time=110.0), "b": demand_of((8, 0), (0, 2), time=103.0)}
    assert rates(older, newer).tolist() == [[2.0 + 2.0, 0.0], [0.0, 0.5]]


def test_a_writer_born_in_the_window_counts_whole() -> None:
    """A writer that started within the window contributes all its rows."""
    older = {"a": demand_of((10,), time=100.0)}
    newer = {"a": demand_of((10,), time=110.0), "b": demand_of((50,), time=110.0, started=104.0)}
    assert rates(older, newer).tolist() == [[5.0]]


def test_an_old_writer_that_reappears_makes_no_spike() -> None:
    """Counts from before the window, or from an unknown time, do not count as new."""
    older = {"a": demand_of((10,), time=100.0)}
    for started in (0.0, 20.0, 99.0):
        newer = {"a": demand_of((20,), time=110.0), "b": demand_of((1_000_000,), time=110.0, started=started)}
        assert rates(older, newer).tolist() == [[1.0]]


def test_counters_that_went_down_are_a_reset() -> None:
    """A writer that restarted under its id contributes its counts since the restart."""
    older = {"a": demand_of((100, 100), time=100.0)}
    newer = {"a": demand_of((5, 120), time=110.0)}
    assert rates(older, newer).tolist() == [[0.5, 12.0]]


def test_a_writer_that_left_no_longer_counts() -> None:
    """Only the newer reading's writers count."""
    older = {"a": demand_of((10,), time=100.0), "gone": demand_of((99,), time=100.0)}
    assert rates(older, {"a": demand_of((20,), time=105.0)}).tolist() == [[2.0]]


def test_without_a_window_the_rates_are_zero() -> None:
    """No readings, a first reading, or the same reading twice give zeros, not a division by zero."""
    reading = {"a": demand_of((10, 20), time=100.0, started=90.0)}
    assert rates({}, {}).shape == (0, 0)
    assert rates({}, reading).tolist() == [[0.0, 0.0]]
    assert rates(reading, reading).tolist() == [[0.0, 0.0]]


def test_writers_of_another_shape_are_left_out() -> None:
    """The last flush of another model's router does not change the rates of the newest model."""
    older = {"new": demand_of((0, 0), time=100.0), "old": demand_of((5,), time=99.0)}
    newer = {"new": demand_of((10, 0), time=110.0), "old": demand_of((6,), time=100.0)}
    assert rates(older, newer).tolist() == [[1.0, 0.0]]


def test_large_counts_stay_exact() -> None:
    """Counters beyond the 53 bits of a float are subtracted as integers."""
    base = 2**62
    added = rates({"a": demand_of((base,), time=0.0)}, {"a": demand_of((base + 3,), time=1.0)})
    assert np.array_equal(added, [[3.0]])


def test_a_writer_knows_its_own_last_seconds() -> None:
    """`RecentRates` gives zeros at first, then the rates of the window, and zeros again once the window is over."""
    recent = RecentRates()
    counted = [(0, 0), (10, 0), (40, 0), (40, 6), (40, 6), (40, 6), (40, 6)]
    found = [recent.rows_per_s(demand_of(rows, time=100.0 + second)).tolist() for second, rows in enumerate(counted)]
    assert found == [[[0, 0]], [[10, 0]], [[20, 0]], [[40 / 3, 2]], [[10, 2]], [[0, 2]], [[0, 0]]]
    assert WINDOW_S == 3


def test_a_writers_own_rates_survive_repetition_restart_and_a_clock_set_back() -> None:
    """A repeated flush gives the same rate, counters that went down count from zero, an earlier time starts again."""
    recent = RecentRates()
    recent.rows_per_s(demand_of((50,), time=100.0))
    for _ in range(2):
        assert recent.rows_per_s(demand_of((58,), time=102.0)).tolist() == [[4.0]]
    assert recent.rows_per_s(demand_of((6,), time=103.0)).tolist() == [[2.0]]
    assert recent.rows_per_s(demand_of((1,), time=50.0)).tolist() == [[0.0]]
    assert recent.rows_per_s(demand_of((4,), time=51.0)).tolist() == [[3.0]]
