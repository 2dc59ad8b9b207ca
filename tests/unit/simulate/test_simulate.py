"""The simulator: traces have the requested properties, time steps agree with events, systems are compared at equal p99."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from event_simulation import run_events

from moiety.simulate.flow import HeldExperts, percentile, time_step, work_per_step
from moiety.simulate.report import compare, lines, plot
from moiety.simulate.scenario import Cluster, day_trace, inclusion, popularity
from moiety.simulate.systems.baselines import clairvoyant, fixed
from moiety.simulate.systems.elastic import elastic
from moiety.simulate.systems.replica_pool import SETTINGS
from moiety.simulate.systems.trace_load import TraceLoad

SMALL = Cluster(layers=16, experts=32, top_k=4, groups=4, hot_sets=0, batch=64)
TINY = Cluster(layers=4, experts=32, top_k=4, groups=8, hot_sets=2, batch=64)


def held_by_groups(cluster: Cluster) -> np.ndarray:
    """Returns [D, L, E]: contiguous experts in every group."""
    group = np.arange(cluster.experts) * cluster.groups // cluster.experts
    return np.stack([np.tile(group == index, (cluster.layers, 1)) for index in range(cluster.groups)])


def test_the_day_has_the_requested_shape() -> None:
    """Mean and peak are the requested ones; equal seeds give equal days, different seeds different ones."""
    trace = day_trace(1e6, peak_over_mean=2.0, seed=3)
    assert trace.hours == 24
    assert trace.rates.mean() == pytest.approx(1e6)
    assert trace.rates.max() / trace.rates.mean() == pytest.approx(2.0, abs=1e-3)
    assert (day_trace(1e6, seed=3).rates == trace.rates).all()
    assert (day_trace(1e6, seed=4).rates != trace.rates).any()


def test_popularity_is_zipf_and_drifts() -> None:
    """The shares of a layer sum to 1 and have the requested skew; with drift they change over hours."""
    still = day_trace(1e6, skew=1.0, drift=False)
    shares = popularity(still, TINY, 0.0)
    assert shares.sum(axis=1) == pytest.approx(1.0)
    assert np.sort(shares[0])[::-1][:3] == pytest.approx(shares.max() / np.array([1, 2, 3]))
    assert (popularity(still, TINY, 9999.0) == shares).all()
    drifting = day_trace(1e6, skew=1.0)
    assert np.abs(popularity(drifting, TINY, 0.0) - popularity(drifting, TINY, 7200.0)).max() > 0.01
    included = inclusion(shares, TINY.top_k)
    assert included.sum(axis=1) == pytest.approx(TINY.top_k)
    assert included.max() <= 1.0


@pytest.mark.parametrize(
    ("replicas", "routers", "skew", "seed"),
    [
        pytest.param(12, 18, 1.0, 0, id="busy 0.45"),
        pytest.param(12, 24, 1.0, 1, id="busy 0.55", marks=pytest.mark.slow),
        pytest.param(10, 15, 0.0, 2, id="even load", marks=pytest.mark.slow),
    ],
)
def test_time_steps_agree_with_events(replicas: int, routers: int, skew: float, seed: int) -> None:
    """Busy is within 3 % and the p99 of a step within 10 % of the simulation of every call."""
    included = inclusion(popularity(day_trace(1e5, skew=skew, drift=False, hours=1), SMALL, 0.0), SMALL.top_k)
    held, counts = held_by_groups(SMALL), np.full(SMALL.groups, replicas)
    played = run_events(SMALL, included, held, counts, routers, steps=25, seed=seed)
    step_work = work_per_step(SMALL, included, HeldExperts.of(held), counts.astype(float))
    seen = time_step(SMALL, step_work, counts.astype(float), played.rate, routers)
    assert seen.busy.mean() == pytest.approx(played.busy, rel=0.03)
    p99_s = percentile(np.array([seen.step_s]), np.array([seen.step_sd_s]), np.ones(1), 0.0, 99)
    assert p99_s == pytest.approx(float(np.percentile(played.steps_s, 99)), rel=0.1)


def test_more_load_waits_longer_and_beyond_capacity_is_not_served() -> None:
    """Busy is proportional to load, steps get longer, and load beyond the capacity is not served."""
    included = inclusion(popularity(day_trace(1e5, drift=False), SMALL, 0.0), SMALL.top_k)
    counts = np.full(SMALL.groups, 4.0)
    step_work = work_per_step(SMALL, included, HeldExperts.of(held_by_groups(SMALL)), counts)
    low, high, over = (time_step(SMALL, step_work, counts, rate) for rate in (1e4, 2e4, 1e6))
    assert high.busy == pytest.approx(2 * low.busy)
    assert high.step_s > low.step_s
    assert (low.served, high.served) == (1e4, 2e4)
    assert over.served < 1e6
    assert over.busy.max() == pytest.approx(0.97)


def test_tokens_that_had_to_wait_count_against_the_p99() -> None:
    """With 0.5 % of late tokens the p99 is finite; with 2 % it is infinite."""
    means, spreads, weights = np.array([0.02, 0.04]), np.array([0.001, 0.001]), np.array([50.0, 50.0])
    assert percentile(means, spreads, weights, 0.0, 99) == pytest.approx(0.04, rel=0.1)
    assert percentile(means, spreads, weights, 0.5, 99) < float("inf")
    assert percentile(means, spreads, weights, 2.0, 99) == float("inf")


@pytest.fixture(scope="module")
def load() -> TraceLoad:
    """The load of two hours of the morning's rise, for a model of 4 layers."""
    return TraceLoad(TINY, day_trace(2e6, hours=2, step_s=20, seed=1))


def test_elastic_groups_follow_the_load(load: TraceLoad) -> None:
    """Replicas follow the load, every change has a reason, under 1 % of tokens wait, and starting replicas are paid for."""
    outcome = elastic(load)
    rates = load.trace.rates
    assert np.corrcoef(outcome.replicas, rates)[0, 1] > 0.8
    assert outcome.delayed < 0.01
    assert outcome.gpu_hours == pytest.approx(outcome.replicas.sum() * load.trace.step_s / 3600)
    assert outcome.decisions
    assert all(decision.reason and decision.inputs for _, decision in outcome.decisions)
    again = elastic(load)
    assert (again.replicas == outcome.replicas).all(), "seeded: a second run is equal"


@pytest.mark.slow
def test_slow_starts_raise_the_p99() -> None:
    """On the same bursts, replicas that start in ten minutes give a higher p99 than those that start at once."""
    trace = day_trace(2e6, hours=2, step_s=10, bursts_per_hour=6, burst=0.8, seed=2)
    quick, slow = (
        elastic(TraceLoad(Cluster(layers=4, experts=32, top_k=4, groups=8, hot_sets=0, batch=64, start_s=start), trace))
        for start in (0.0, 600.0)
    )
    assert slow.p99_ms > quick.p99_ms


def test_the_clairvoyant_system_needs_fewer_gpu_hours_than_the_elastic_one(load: TraceLoad) -> None:
    """At the same busy fraction, clairvoyant needs fewer GPU-hours than elastic; a smaller static size has longer steps."""
    oracle, static = clairvoyant(load, SETTINGS.target_busy), fixed(load, 40)
    assert oracle.gpu_hours < elastic(load).gpu_hours
    assert static.gpu_hours == pytest.approx(40 * TINY.groups * load.trace.hours)
    assert fixed(load, 30).p99_ms > static.p99_ms


@pytest.mark.slow
def test_the_report_compares_at_equal_p99(tmp_path: Path) -> None:
    """No system has a longer p99 than the elastic one; JSON and table agree; the picture is drawn."""
    report = compare(TINY, day_trace(2e6, hours=1, step_s=20, seed=1))
    ours = report.results[0]
    assert [result.system for result in report.results] == [
        "elastic", "whole engines", "EPLB, 1/8 redundant", "static EP", "clairvoyant",
    ]  # fmt: skip
    assert all(result.p99_ms <= ours.p99_ms for result in report.results)
    value = json.loads(json.dumps(report.json()))
    static = report.results[3]
    assert value["saved_vs_static"] == pytest.approx(1 - ours.gpu_hours / static.gpu_hours)
    assert value["systems"][0]["decisions"][0]["reason"]
    assert "elastic saves" in "\n".join(lines(report))
    plot(report, tmp_path / "day.png")
    assert (tmp_path / "day.png").stat().st_size > 10_000
