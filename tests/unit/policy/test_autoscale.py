"""The autoscaling policy, driven by a fake clock and a fake group whose busy fraction follows its load."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.config.application import GroupSettings
from moiety.policy.autoscale import (
    SETTLE_S,
    STEP_TIMEOUT_S,
    Decision,
    Snapshot,
    State,
    decide,
    predicted_busy,
    router_busy,
)

TICK_S = 0.25
SETTINGS = GroupSettings(min_replicas=1, max_replicas=4, target_busy=0.6, queue_wait_ms=50, shrink_after_s=10)
QUIET = Snapshot("experts-0", target=1, live=1, reporting=1, busy=0.2, queue_wait_ms=0.0, rows_per_s=100.0)


@dataclass
class Group:
    """A group whose replicas come up `start_s` after they are asked for; `load` is in replicas' worth of work."""

    settings: GroupSettings = SETTINGS
    target: int = 1
    live: int = 1
    start_s: float = 2.0
    now: float = 1000.0
    load: float = 0.0
    missing_experts: bool = False
    stale: bool = False
    state: State = field(default_factory=State)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    _asked_at: float = 0.0

    def run(self, seconds: float) -> list[Decision]:
        """Lets time pass; returns the decisions of that time that changed the target."""
        before = len(self.decisions)
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            if self.live > self.target or self.now - self._asked_at >= self.start_s:
                self.live = self.target
            decision = decide(self.snapshot(), self.state, self.settings, self.now)
            self.state = decision.state
            if decision.changes:
                self.target, self._asked_at = decision.target, self.now
                self.decisions.append((self.now, decision))
        return [decision for _, decision in self.decisions[before:]]

    def snapshot(self) -> Snapshot:
        busy = min(1.0, self.load / self.live) if self.live else 0.0
        return Snapshot(
            "experts-0",
            self.target,
            self.live,
            self.live,
            busy,
            0.0,
            1000 * min(self.load, self.live),  # routers send no more than is answered
            missing_experts=self.missing_experts,
            stale=self.stale,
        )


def test_the_reason_names_the_numbers() -> None:
    """A step up says what was seen, what it was held against, and what follows; the inputs are those numbers."""
    decision = decide(replace(QUIET, target=2, live=2, reporting=2, busy=0.92), State(), SETTINGS, 0.0)
    assert decision.reason == "busy 0.92 of 2 replicas > target 0.60: 2 → 4"
    assert (decision.current, decision.target, decision.changes) == (2, 4, True)
    assert decision.inputs["busy"] == 0.92
    assert decision.inputs["live"] == 2


def test_step_load_grows_at_once_and_shrinks_one_at_a_time() -> None:
    """Load that jumps is answered on the next tick; when it is gone, replicas go one by one, each after a calm time."""
    group = Group()
    group.load = 2.2
    grown = group.run(10)
    assert [(d.current, d.target) for d in grown] == [(1, 2), (2, 4)]
    assert group.decisions[0][0] == 1000.0 + TICK_S
    assert group.run(30) == []
    group.load = 0.1
    shrunk = group.run(60)
    assert [(d.current, d.target) for d in shrunk] == [(4, 3), (3, 2), (2, 1)]
    times = [time for time, _ in group.decisions[-3:]]
    assert all(later - earlier >= SETTINGS.shrink_after_s for earlier, later in pairwise(times))


def test_no_second_step_before_the_first_is_live() -> None:
    """While a new replica starts, full load asks for nothing more; afterwards reports get time to settle."""
    group = Group(start_s=6.0)
    group.load = 3.0
    assert [d.target for d in group.run(6)] == [2]
    assert [d.target for d in group.run(6)] == [4]
    first, second = (time for time, _ in group.decisions)
    assert second - first >= 6.0 + SETTLE_S


def test_a_replica_that_never_comes_up_does_not_block_for_ever() -> None:
    """After STEP_TIMEOUT_S a queue that is still too long may ask for one replica more."""
    asked = replace(QUIET, target=2, live=1, queue_wait_ms=200.0)
    state = decide(asked, State(), SETTINGS, 0.0).state
    early = decide(asked, state, SETTINGS, STEP_TIMEOUT_S - 1)
    assert not early.changes
    assert decide(asked, early.state, SETTINGS, STEP_TIMEOUT_S).target == 3


def test_long_queue_steps_up_although_the_device_is_not_busy() -> None:
    """The queue-wait override grows by one at once and names both waits."""
    decision = decide(replace(QUIET, queue_wait_ms=80.0), State(), SETTINGS, 0.0)
    assert decision.reason == "queue wait 80 ms > limit 50 ms: 1 → 2"


def test_oscillating_load_does_not_flap() -> None:
    """Load that swings faster than `shrink_after_s` holds the size its peaks need."""
    group = Group()
    for _ in range(20):
        group.load = 1.1
        group.run(4)
        group.load = 0.1
        group.run(4)
    assert [d.target for _, d in group.decisions] == [2]


def test_no_shrink_into_a_step_up() -> None:
    """A step down whose predicted busy would touch the margin is not taken, however long load stays there."""
    group = Group(target=2, live=2)
    group.load = 0.5  # 0.25 of two, 0.50 of one: above 0.8 of 0.6
    assert group.run(120) == []
    group.load = 0.45
    assert [d.target for d in group.run(120)] == [1]


def test_stale_data_holds_and_restarts_the_calm_time() -> None:
    """With the registry silent nothing changes, and the time of silence does not count as calm."""
    group = Group(target=3, live=3)
    group.load = 0.0
    group.run(9)
    group.stale = True
    assert group.run(60) == []
    group.stale = False
    assert group.run(9) == []
    assert [d.target for d in group.run(2)] == [2]


def test_an_emptied_registry_is_not_idleness() -> None:
    """No live replica and no report, although replicas were asked for, changes nothing, with or without load before."""
    emptied = replace(QUIET, target=2, live=0, reporting=0, busy=0.0, rows_per_s=0.0)
    settings = SETTINGS.model_copy(update={"min_replicas": 0, "shrink_after_s": 0.0})
    state = State()
    for now in range(100):
        decision = decide(emptied, state, settings, float(now))
        assert not decision.changes
        state = decision.state


def test_shrinking_waits_for_every_replica_to_report() -> None:
    """The mean of some replicas says nothing about the others."""
    settings = SETTINGS.model_copy(update={"shrink_after_s": 0.0})
    partly = replace(QUIET, target=3, live=3, reporting=2, busy=0.0)
    assert decide(partly, State(), settings, 0.0).target == 3
    assert decide(replace(partly, reporting=3), State(), settings, 0.0).target == 2


@pytest.mark.parametrize(("target", "expected"), [(0, 1), (7, 4)])
def test_bounds_are_kept(target: int, expected: int) -> None:
    """A target outside the bounds, after a change of settings, goes straight to the nearest bound."""
    decision = decide(replace(QUIET, target=target, live=target, reporting=target), State(), SETTINGS, 0.0)
    assert decision.target == expected
    assert "bounds are 1 to 4" in decision.reason


def test_at_the_upper_bound_it_says_so() -> None:
    """Full load at max_replicas holds, with a reason that tells the operator which setting to raise."""
    decision = decide(replace(QUIET, target=4, live=4, reporting=4, busy=1.0), State(), SETTINGS, 0.0)
    assert decision.target == 4
    assert decision.reason.endswith("but max_replicas is 4: stay at 4")


def test_zero_and_back() -> None:
    """Without demand the last replica goes after the calm time; a waiting request brings one back on the next tick."""
    group = Group(settings=SETTINGS.model_copy(update={"min_replicas": 0}))
    assert [d.target for d in group.run(11)] == [0]
    assert group.run(60) == []
    group.missing_experts = True
    assert [d.reason for d in group.run(TICK_S)] == ["its experts are waited for: 0 → 1"]


def test_the_last_replica_stays_while_there_is_demand() -> None:
    """Any traffic at all keeps one replica, and traffic at zero brings one back."""
    group = Group(settings=SETTINGS.model_copy(update={"min_replicas": 0}))
    group.load = 0.001
    assert group.run(120) == []
    empty = replace(QUIET, target=0, live=0, reporting=0, busy=0.0, rows_per_s=5.0)
    assert decide(empty, State(), group.settings, 0.0).target == 1


def test_rounding_asks_for_no_replica_too_many() -> None:
    """3 replicas at 0.4 against a target of 0.3 are exactly 4 replicas' worth."""
    settings = SETTINGS.model_copy(update={"target_busy": 0.3, "max_replicas": 9})
    assert decide(replace(QUIET, target=3, live=3, reporting=3, busy=0.4), State(), settings, 0.0).target == 4


def test_growth_aims_past_what_is_fixed() -> None:
    """Where half of a batch's time stays, halving busy takes more than twice the replicas."""
    settings = SETTINGS.model_copy(update={"max_replicas": 9})
    busy = replace(QUIET, target=2, live=2, reporting=2, busy=0.8, fixed=0.5)
    decision = decide(busy, State(), settings, 0.0)
    assert decision.target == 4  # 0.8 * (0.5 + 0.5 * 2 / 4) = 0.6
    assert predicted_busy(busy, decision.target) == pytest.approx(settings.target_busy)
    assert decision.inputs["fixed"] == 0.5


def test_growth_that_would_not_help_is_not_tried() -> None:
    """Nearly all of a batch's time is fixed: another replica would relieve the first by less than a tenth."""
    decision = decide(replace(QUIET, busy=0.9, fixed=0.85), State(), SETTINGS, 0.0)
    assert not decision.changes
    assert "85% of it is fixed: twice the replicas would relieve each by 8%" in decision.reason


def test_a_step_that_did_not_help_is_not_repeated_until_later() -> None:
    """A second replica that leaves the first as busy per row as it was stops growth, with the numbers, for a while."""
    alone = replace(QUIET, busy=0.9)
    state = decide(alone, State(), SETTINGS, 0.0).state
    two = replace(alone, target=2, live=2, reporting=2)
    state = decide(two, state, SETTINGS, 5.0).state
    after = decide(two, state, SETTINGS, 5.0 + SETTLE_S)
    assert not after.changes
    assert "the step 1 → 2 replicas changed busy per row by -0% where -50% was due" in after.reason
    assert not decide(two, after.state, SETTINGS, 20.0).changes
    assert decide(two, after.state, SETTINGS, 5.0 + SETTLE_S + STEP_TIMEOUT_S).target == 3


def test_a_step_that_helped_is_followed_by_the_next() -> None:
    """Twice the rows at the same busy fraction is the relief that was due, and more load asks for more."""
    alone = replace(QUIET, busy=0.9)
    state = decide(alone, State(), SETTINGS, 0.0).state
    two = replace(alone, target=2, live=2, reporting=2, rows_per_s=2 * alone.rows_per_s)
    state = decide(two, state, SETTINGS, 5.0).state
    assert decide(two, state, SETTINGS, 5.0 + SETTLE_S).target == 3


def test_a_ramp_is_followed_while_replicas_start() -> None:
    """Load that keeps rising asks for more before the last replicas are there; a queue alone does not."""
    settings = SETTINGS.model_copy(update={"max_replicas": 40})
    rising = replace(QUIET, target=11, live=10, reporting=10, busy=0.7)
    state = decide(rising, State(short_since=0.0, live=10), settings, 1.0).state
    assert decide(rising, state, settings, 1.0).target == 12
    waiting = replace(rising, busy=0.5, queue_wait_ms=500.0)
    assert not decide(waiting, State(short_since=0.0, live=10), settings, 1.0).changes


def test_many_replicas_go_by_tenths() -> None:
    """Of forty replicas up to four go at once, and never so many that the rest would be too busy."""
    settings = SETTINGS.model_copy(update={"max_replicas": 99, "shrink_after_s": 0.0})
    idle = replace(QUIET, target=40, live=40, reporting=40, busy=0.1)
    assert decide(idle, State(), settings, 0.0).target == 36
    assert decide(replace(idle, busy=0.45), State(), settings, 0.0).target == 38  # 0.474 on 38, 0.486 on 37


def test_a_hot_set_lives_while_it_is_worth_it() -> None:
    """Others hold what a hot set holds: it comes for load that fills a replica, and goes although some load is left."""
    settings = SETTINGS.model_copy(update={"min_replicas": 0, "shrink_after_s": 0.0})
    asleep = replace(QUIET, target=0, live=0, reporting=0, busy=0.0, spare=True)
    assert not decide(replace(asleep, asked=0.2), State(), settings, 0.0).changes
    assert decide(replace(asleep, asked=0.4), State(), settings, 0.0).target == 1
    assert decide(replace(QUIET, busy=0.1, spare=True), State(), settings, 0.0).target == 0
    assert decide(replace(QUIET, busy=0.2, spare=True), State(), settings, 0.0).target == 1


def test_a_router_is_as_busy_as_its_scarcest_room() -> None:
    """Slots or KV blocks, whichever is fuller; an empty router is not busy at all."""
    assert router_busy(running=8, slots=32, used_blocks=900, blocks=1000) == 0.9
    assert router_busy(running=30, slots=32, used_blocks=10, blocks=1000) == 30 / 32
    assert router_busy(0, 0, 0, 0) == 0.0


@settings(deadline=None)
@given(
    target=st.integers(0, 50),
    live=st.integers(0, 50),
    reporting=st.integers(0, 50),
    busy=st.floats(0, 1),
    wait=st.floats(0, 1000),
    rows=st.floats(0, 1e6),
    fixed=st.floats(0, 1),
    missing_experts=st.booleans(),
    now=st.floats(0, 100),
    low_since=st.none() | st.floats(0, 100),
)
def test_whatever_is_seen_bounds_hold_and_the_last_holder_stays(
    target: int, live: int, reporting: int, busy: float, wait: float, rows: float, fixed: float, missing_experts: bool,
    now: float, low_since: float | None,
) -> None:  # fmt: skip
    """Every decision is within the bounds, and none takes the last holder away while there is demand."""
    settings = GroupSettings(min_replicas=0, max_replicas=40, shrink_after_s=1.0)
    seen = Snapshot(
        "experts-0", target, live, min(reporting, live), busy, wait, rows, missing_experts=missing_experts, fixed=fixed
    )
    decision = decide(seen, State(low_since=low_since), settings, now)
    assert 0 <= decision.target <= 40
    assert decision.reason
    if target > 0 and (rows > 0 or missing_experts):
        assert decision.target > 0
