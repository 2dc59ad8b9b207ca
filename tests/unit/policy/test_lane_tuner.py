"""The choice between one lane and two: by measurement, at a bounded cost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moiety.policy.lane_tuner import TRIALS, LaneTuner


def run(tuner: LaneTuner, cost: dict[int, float], steps: int, size: int = 8) -> float:
    """Runs `steps` steps that take `cost[lanes]` seconds each; returns their time."""
    total = 0.0
    for _ in range(steps):
        lanes = tuner.choose(size)
        tuner.observe(size, lanes, cost[lanes])
        total += cost[lanes]
    return total


@given(st.floats(0.5, 2.0))
def test_lanes_never_cost_more_than_a_percent(ratio: float) -> None:
    """A long run takes at most 1 % longer than the better way (4.5 % if the two differ by less than 4 %)."""
    cost = {1: 1.0, 2: ratio}
    steps = 20_000
    assert run(LaneTuner(), cost, steps) <= steps * min(cost.values()) * (1.01 if abs(ratio - 1) > 0.04 else 1.045)


def test_verdicts_follow_the_machine() -> None:
    """Lanes are switched on once they are faster, and off again once they are slower."""
    tuner = LaneTuner()
    run(tuner, {1: 1.0, 2: 1.3}, 2 * TRIALS)
    assert tuner.verdicts() == {8: 1}
    run(tuner, {1: 1.0, 2: 0.7}, 2000)
    assert tuner.verdicts() == {8: 2}
    run(tuner, {1: 0.5, 2: 0.7}, 4000)
    assert tuner.verdicts() == {8: 1}


def test_sizes_are_judged_apart() -> None:
    """Each step size has its own verdict: lanes may lose at a small size and win at a large one."""
    tuner = LaneTuner()
    run(tuner, {1: 1.0, 2: 1.3}, 100, size=2)
    run(tuner, {1: 1.0, 2: 0.7}, 100, size=64)
    assert tuner.verdicts() == {2: 1, 64: 2}


def test_one_slow_step_decides_nothing() -> None:
    """One slow trial does not change the verdict of the others."""
    tuner = LaneTuner()
    for step in range(2 * TRIALS):
        lanes = tuner.choose(1)
        tuner.observe(1, lanes, 50.0 if step == 1 else {1: 1.0, 2: 0.8}[lanes])
    assert tuner.verdicts() == {1: 2}


def test_lanes_that_clearly_lose_end_the_trial_early() -> None:
    """Two steps each way are enough if the best with lanes takes a tenth longer than the worst without."""
    tuner, tried = LaneTuner(), []
    for _ in range(40):
        lanes = tuner.choose(8)
        tried.append(lanes)
        tuner.observe(8, lanes, 1.5 if lanes > 1 else 1.0)
    assert sum(lanes > 1 for lanes in tried) == 2
