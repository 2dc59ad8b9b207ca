"""`moiety bench control` on a small system and a real Redis."""

from __future__ import annotations

from moiety.bench.control import ControlWork, bench_control, control_lines


def test_everything_is_measured() -> None:
    """For 20 replicas all times are above zero, and Redis gets at least the operations of heartbeats and readers."""
    work = ControlWork(replicas=20, routers=2, layers=4, experts=16, groups=4, hot_sets=1, rounds=1)
    report = bench_control(work)
    assert min(report.plan_s, report.replan_s, report.table_s, report.dispatch_s) > 0
    assert report.redis_operations_per_s > 20 * 2 * 3, "two heartbeats a second: two operations, and one for the epoch"
    assert report.redis_bytes_per_s > 10_000
    assert report.redis_change_bytes > 20 * 300 * 4, (
        "20 entries are written, and read by two routers and the autoscaler"
    )
    text = "\n".join(control_lines(report, work))
    assert "20 replicas of 4 groups and 1 hot sets, 64 (layer, expert) pairs" in text
