"""Percentiles and speeds from given times."""

from __future__ import annotations

import pytest

from moiety.bench.report import percentile, table
from moiety.bench.token_speeds import Speeds, median, speeds


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.5), (100, 4.0), (75, 3.25)])
def test_percentile_interpolates(percent: float, expected: float) -> None:
    """Between two samples the percentile is interpolated; the order of the samples does not matter."""
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == expected


def test_speeds_of_known_times() -> None:
    """Decode counts from the time when all streams have a first token: an early stream gains nothing."""
    began = 10.0
    early = [10.1, 10.2, 10.3, 10.4, 10.5]
    late = [10.3, 10.4, 10.5, 10.6, 10.7]
    computed = speeds(began, [early, late], prompt_tokens=30)
    assert computed.decode_tokens_per_s == pytest.approx(6 / 0.4)  # 2 of the early stream, 4 of the late one
    assert computed.itl_p50_ms == pytest.approx(100)
    assert computed.itl_p99_ms == pytest.approx(100)
    assert computed.ttft_p50_ms == pytest.approx(200)
    assert computed.prefill_tokens_per_s == pytest.approx(60 / 0.3)


def test_median_of_each_speed() -> None:
    """The median is taken of each speed by itself; one bad round does not decide it."""
    runs = [Speeds(10, 1, 2, 3, 100), Speeds(12, 1, 2, 3, 90), Speeds(0.1, 99, 99, 99, 1)]
    assert median(runs) == Speeds(10, 1, 2, 3, 90)


def test_table_aligns() -> None:
    """Columns are right-aligned and as wide as their widest cell."""
    assert list(table(("a", "long"), [("123", "4")])) == ["  a  long", "123     4"]
