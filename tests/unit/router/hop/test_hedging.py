"""When a hedge is due, and how many the budget allows."""

from __future__ import annotations

import pytest

from moiety.core.expert_backend import CallClass
from moiety.router.hop.hedging import BURST, FEWEST, UNKNOWN_S, WINDOW, Hedging


def test_an_unknown_layer_waits_a_second():
    """Without statistics, a hedge is due after at least UNKNOWN_S, because first calls include warm-up."""
    assert Hedging(0.02, 0.1).delay(0, CallClass.DECODE) == UNKNOWN_S
    assert Hedging(5.0, 0.1).delay(0, CallClass.DECODE) == 5.0


def test_a_hedge_is_due_past_three_times_the_p99_of_its_layer_and_class():
    """Each (layer, class) has its own p99; a hedge is due after least_s at the earliest."""
    hedging = Hedging(0.02, 0.1)
    for _ in range(FEWEST):
        hedging.record_latency(0, CallClass.PREFILL, 0.1)
        hedging.record_latency(1, CallClass.DECODE, 0.001)
    assert hedging.delay(0, CallClass.PREFILL) == pytest.approx(0.3)
    assert hedging.delay(1, CallClass.DECODE) == 0.02
    assert hedging.delay(0, CallClass.DECODE) == UNKNOWN_S


def test_old_latencies_are_forgotten():
    """The p99 covers only the last WINDOW calls, so warm-up drops out."""
    hedging = Hedging(0.001, 0.1)
    for seconds in (1.0, 0.01):
        for _ in range(WINDOW):
            hedging.record_latency(0, CallClass.DECODE, seconds)
    assert hedging.delay(0, CallClass.DECODE) == pytest.approx(0.03)


@pytest.mark.parametrize("budget", [0.0, 0.1, 1.0])
def test_hedges_are_a_burst_and_a_fraction_of_all_calls(budget: float):
    """Hedges are at most BURST + budget * calls; an unused budget does not accumulate beyond BURST."""
    hedging = Hedging(0.02, budget)
    for _ in range(1000):
        hedging.count_call()
    at_once = sum(hedging.take() for _ in range(100))
    assert at_once == BURST
    later = 0
    for _ in range(1000):
        hedging.count_call()
        later += hedging.take()
    assert later == pytest.approx(budget * 1000, abs=1)
