"""When the autoscaling policy grows, holds back or follows a ramp: fixed cost, judged steps, starting replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moiety.config.options import Scaling
from moiety.policy.autoscale import LEAST_PATIENCE_S, PATIENCE, SETTLE_S, Snapshot, State, decide, predicted_busy

SETTINGS = Scaling(min_replicas=1, max_replicas=4, target_busy=0.6, queue_wait_ms=50, shrink_after_s=10)
QUIET = Snapshot("experts-0", target=1, live=1, reporting=1, busy=0.2, queue_wait_ms=0.0, rows_per_s=100.0)


def test_growth_accounts_for_the_fixed_part() -> None:
    """If half of a batch's time is fixed, growth aims at more replicas than without, and so meets the target."""
    settings = SETTINGS.model_copy(update={"max_replicas": 9})
    busy = replace(QUIET, target=2, live=2, reporting=2, busy=0.8, fixed=0.5)
    decision = decide(busy, State(), settings, 0.0)
    assert decision.target == 4  # 0.8 * (0.5 + 0.5 * 2 / 4) = 0.6
    assert predicted_busy(busy, decision.target) == pytest.approx(settings.target_busy)
    assert decision.inputs["fixed"] == 0.5


def test_growth_that_would_not_help_is_not_tried() -> None:
    """If nearly all of a batch's time is fixed, twice the replicas would relieve each by less than a tenth: hold."""
    decision = decide(replace(QUIET, busy=0.9, fixed=0.85), State(), SETTINGS, 0.0)
    assert not decision.changes
    assert "85% of it is fixed per batch: twice the replicas would relieve each by 8%" in decision.reason


def test_a_step_that_did_not_help_is_not_repeated_until_later() -> None:
    """A second replica that does not lower busy per row stops growth for a while; the reason names the numbers."""
    alone = replace(QUIET, busy=0.9)
    state = decide(alone, State(), SETTINGS, 0.0).state
    two = replace(alone, target=2, live=2, reporting=2)
    state = decide(two, state, SETTINGS, 5.0).state
    after = decide(two, state, SETTINGS, 5.0 + SETTLE_S)
    assert not after.changes
    assert "the step 1 → 2 replicas changed busy per row by -0%, expected -50%" in after.reason
    assert not decide(two, after.state, SETTINGS, 20.0).changes
    assert decide(two, after.state, SETTINGS, 5.0 + SETTLE_S + LEAST_PATIENCE_S).target == 3


def test_a_step_that_helped_is_followed_by_the_next() -> None:
    """Twice the rows at the same busy fraction is the expected relief, so more load may grow the group again."""
    alone = replace(QUIET, busy=0.9)
    state = decide(alone, State(), SETTINGS, 0.0).state
    two = replace(alone, target=2, live=2, reporting=2, rows_per_s=2 * alone.rows_per_s)
    state = decide(two, state, SETTINGS, 5.0).state
    assert decide(two, state, SETTINGS, 5.0 + SETTLE_S).target == 3


def test_a_ramp_is_followed_while_replicas_start() -> None:
    """Rising load adds replicas before the last ones are live; a long queue alone does not."""
    settings = SETTINGS.model_copy(update={"max_replicas": 40})
    rising = replace(QUIET, target=11, live=10, reporting=10, busy=0.7)
    state = decide(rising, State(starting_since=0.0, live=10), settings, 1.0).state
    assert decide(rising, state, settings, 1.0).target == 12
    waiting = replace(rising, busy=0.5, queue_wait_ms=500.0)
    assert not decide(waiting, State(starting_since=0.0, live=10), settings, 1.0).changes


def wishes(start_s: float, snapshot: Snapshot, until_s: float) -> list[int]:
    """The targets of a deployment whose replicas need `start_s` seconds to start, decided four times a second."""
    settings = SETTINGS.model_copy(update={"max_replicas": 1000})
    state, requested, targets = State(), [(0.0, snapshot.target)], [snapshot.target]
    for step in range(int(until_s * 4)):
        now = step / 4
        live = max(count for since, count in requested if since == 0.0 or since + start_s <= now)
        decision = decide(replace(snapshot, target=targets[-1], live=live, reporting=live), state, settings, now)
        state = decision.state
        if decision.changes:
            targets.append(decision.target)
            requested.append((now, decision.target))
    return targets


@pytest.mark.parametrize(
    "load",
    [{"queue_wait_ms": 500.0}, {"busy": 1.0, "fixed": 0.7}],
    ids=["queue", "unreachable target"],
)
def test_starts_of_minutes_are_waited_for(load: dict[str, float]) -> None:
    """Where a start takes 3 minutes, which the live replicas tell, growth wishes once and waits for it."""
    slow = replace(QUIET, start_s=180.0, **load)
    assert wishes(180.0, slow, 179.0) == [1, 2]
    assert len(wishes(180.0, replace(slow, start_s=0.0), 179.0)) > 2, "without a measured start, patience is short"


def test_patience_follows_what_starts_took() -> None:
    """A start that the policy has seen itself counts, too, for instance with the time that a cluster needs for a new node."""
    short = replace(QUIET, target=2, queue_wait_ms=500.0)
    state = decide(short, State(), SETTINGS, 0.0).state
    state = decide(replace(short, live=2, reporting=2, queue_wait_ms=0.0), state, SETTINGS, 100.0).state
    state = decide(short, state, SETTINGS, 200.0).state  # one of the two is gone
    assert not decide(short, state, SETTINGS, 200.0 + PATIENCE * 100.0 - 1).changes
    assert decide(short, state, SETTINGS, 200.0 + PATIENCE * 100.0).target == 3
    again = replace(short, start_s=150.0)
    assert not decide(again, state, SETTINGS, 200.0 + PATIENCE * 150.0 - 1).changes
