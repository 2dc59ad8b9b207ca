"""The autoscaling policy, driven by a fake clock and a fake group whose busy fraction follows its load."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.config.options import Scaling
from moiety.policy.autoscale import (
    LEAST_PATIENCE_S,
    SETTLE_S,
    Decision,
    Snapshot,
    State,
    decide,
    router_busy,
)

TICK_S = 0.25
SETTINGS = Scaling(min_replicas=1, max_replicas=4, target_busy=0.6, queue_wait_ms=50, shrink_after_s=10)
QUIET = Snapshot("experts-0", target=1, live=1, reporting=1, busy=0.2, queue_wait_ms=0.0, rows_per_s=100.0)


@dataclass
class Group:
    """A group whose replicas are live `start_s` after the request; `load` is measured in fully busy replicas."""

    settings: Scaling = SETTINGS
    target: int = 1
    live: int = 1
    start_s: float = 2.0
    now: float = 1000.0
    load: float = 0.0
    missing_experts: bool = False
    stale: bool = False
    state: State = field(default_factory=State)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    _requested_at: float = 0.0

    def run(self, seconds: float) -> list[Decision]:
        """Lets time pass; returns the decisions that changed the target meanwhile."""
        before = len(self.decisions)
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            if self.live > self.target or self.now - self._requested_at >= self.start_s:
                self.live = self.target
            decision = decide(self.snapshot(), self.state, self.settings, self.now)
            self.state = decision.state
            if decision.changes:
                self.target, self._requested_at = decision.target, self.now
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
            1000 * min(self.load, self.live),  # routers send no more rows than are answered
            missing_experts=self.missing_experts,
            stale=self.stale,
        )


def test_the_reason_names_the_numbers() -> None:
    """The reason of a step up names the measured value, the limit and the new target; the inputs hold these numbers."""
    decision = decide(replace(QUIET, target=2, live=2, reporting=2, busy=0.92), State(), SETTINGS, 0.0)
    assert decision.reason == "busy 0.92 of 2 replicas > target 0.60: 2 → 4"
    assert (decision.current, decision.target, decision.changes) == (2, 4, True)
    assert decision.inputs["busy"] == 0.92
    assert decision.inputs["live"] == 2


def test_step_load_grows_at_once_and_shrinks_one_at_a_time() -> None:
    """A load jump grows the group on the next tick; afterwards replicas go one by one, each after shrink_after_s."""
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
    """While a new replica starts, full load adds no other; after it is live, the policy waits SETTLE_S."""
    group = Group(start_s=6.0)
    group.load = 3.0
    assert [d.target for d in group.run(6)] == [2]
    assert [d.target for d in group.run(6)] == [4]
    first, second = (time for time, _ in group.decisions)
    assert second - first >= 6.0 + SETTLE_S


def test_a_replica_that_never_comes_up_does_not_block_for_ever() -> None:
    """After LEAST_PATIENCE_S, a queue that is still too long may add one replica."""
    short = replace(QUIET, target=2, live=1, queue_wait_ms=200.0)
    state = decide(short, State(), SETTINGS, 0.0).state
    early = decide(short, state, SETTINGS, LEAST_PATIENCE_S - 1)
    assert not early.changes
    assert decide(short, early.state, SETTINGS, LEAST_PATIENCE_S).target == 3


def test_long_queue_steps_up_although_the_device_is_not_busy() -> None:
    """A queue wait beyond the limit adds one replica at once, and the reason names both waits."""
    decision = decide(replace(QUIET, queue_wait_ms=80.0), State(), SETTINGS, 0.0)
    assert decision.reason == "queue wait 80 ms > limit 50 ms: 1 → 2"


def test_oscillating_load_does_not_flap() -> None:
    """Load that swings faster than `shrink_after_s` keeps the size that its peaks need."""
    group = Group()
    for _ in range(20):
        group.load = 1.1
        group.run(4)
        group.load = 0.1
        group.run(4)
    assert [d.target for _, d in group.decisions] == [2]


def test_no_step_down_that_would_cause_a_step_up() -> None:
    """A step down is not taken while its predicted busy is above the margin, however long the load stays low."""
    group = Group(target=2, live=2)
    group.load = 0.5  # 0.25 of two, 0.50 of one: above 0.8 of 0.6
    assert group.run(120) == []
    group.load = 0.45
    assert [d.target for d in group.run(120)] == [1]


def test_stale_data_holds_and_restarts_the_low_time() -> None:
    """While the registry does not answer nothing changes, and that time does not count as low load."""
    group = Group(target=3, live=3)
    group.load = 0.0
    group.run(9)
    group.stale = True
    assert group.run(60) == []
    group.stale = False
    assert group.run(9) == []
    assert [d.target for d in group.run(2)] == [2]


def test_an_emptied_registry_is_not_idleness() -> None:
    """No live replica and no report, although replicas were requested, changes nothing."""
    emptied = replace(QUIET, target=2, live=0, reporting=0, busy=0.0, rows_per_s=0.0)
    settings = SETTINGS.model_copy(update={"min_replicas": 0, "shrink_after_s": 0.0})
    state = State()
    for now in range(100):
        decision = decide(emptied, state, settings, float(now))
        assert not decision.changes
        state = decision.state


def test_shrinking_waits_for_every_replica_to_report() -> None:
    """If one live replica does not report its load, the group does not shrink."""
    settings = SETTINGS.model_copy(update={"shrink_after_s": 0.0})
    partly = replace(QUIET, target=3, live=3, reporting=2, busy=0.0)
    assert decide(partly, State(), settings, 0.0).target == 3
    assert decide(replace(partly, reporting=3), State(), settings, 0.0).target == 2


@pytest.mark.parametrize(("target", "expected"), [(0, 1), (7, 4)])
def test_bounds_are_kept(target: int, expected: int) -> None:
    """After a change of settings, a target outside the bounds goes straight to the nearest bound."""
    decision = decide(replace(QUIET, target=target, live=target, reporting=target), State(), SETTINGS, 0.0)
    assert decision.target == expected
    assert "bounds are 1 to 4" in decision.reason


def test_the_reason_names_the_upper_bound() -> None:
    """Full load at max_replicas holds, and the reason names the setting to raise."""
    decision = decide(replace(QUIET, target=4, live=4, reporting=4, busy=1.0), State(), SETTINGS, 0.0)
    assert decision.target == 4
    assert decision.reason.endswith("but max_replicas is 4: stay at 4")


def test_zero_and_back() -> None:
    """Without demand the last replica goes after shrink_after_s; a waiting request starts one on the next tick."""
    group = Group(settings=SETTINGS.model_copy(update={"min_replicas": 0}))
    assert [d.target for d in group.run(11)] == [0]
    assert group.run(60) == []
    group.missing_experts = True
    assert [d.reason for d in group.run(TICK_S)] == ["requests or a starting router wait for its experts: 0 → 1"]


def test_the_last_replica_stays_while_there_is_demand() -> None:
    """The least traffic keeps one replica; traffic to a group at zero starts one."""
    group = Group(settings=SETTINGS.model_copy(update={"min_replicas": 0}))
    group.load = 0.001
    assert group.run(120) == []
    empty = replace(QUIET, target=0, live=0, reporting=0, busy=0.0, rows_per_s=5.0)
    assert decide(empty, State(), group.settings, 0.0).target == 1


def test_rounding_adds_no_replica_too_many() -> None:
    """3 replicas at 0.4 need exactly 4 replicas for a target of 0.3, not 5."""
    settings = SETTINGS.model_copy(update={"target_busy": 0.3, "max_replicas": 9})
    assert decide(replace(QUIET, target=3, live=3, reporting=3, busy=0.4), State(), settings, 0.0).target == 4


def test_many_replicas_shrink_by_tenths() -> None:
    """Of forty replicas up to four go at once, but not so many that the rest would be too busy."""
    settings = SETTINGS.model_copy(update={"max_replicas": 99, "shrink_after_s": 0.0})
    idle = replace(QUIET, target=40, live=40, reporting=40, busy=0.1)
    assert decide(idle, State(), settings, 0.0).target == 36
    assert decide(replace(idle, busy=0.45), State(), settings, 0.0).target == 38  # 0.474 on 38, 0.486 on 37


def test_a_hot_set_lives_while_it_is_worth_it() -> None:
    """A hot set starts only for enough load, and goes while some load is left, because groups hold its experts too."""
    settings = SETTINGS.model_copy(update={"min_replicas": 0, "shrink_after_s": 0.0})
    asleep = replace(QUIET, target=0, live=0, reporting=0, busy=0.0, spare=True)
    assert not decide(replace(asleep, busy_if_added=0.2), State(), settings, 0.0).changes
    assert decide(replace(asleep, busy_if_added=0.4), State(), settings, 0.0).target == 1
    assert decide(replace(QUIET, busy=0.1, spare=True), State(), settings, 0.0).target == 0
    assert decide(replace(QUIET, busy=0.2, spare=True), State(), settings, 0.0).target == 1


def test_a_router_is_as_busy_as_its_scarcest_resource() -> None:
    """Slots or KV blocks, whichever is fuller; an empty router has busy 0."""
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
def test_bounds_hold_and_the_last_holder_stays(
    target: int, live: int, reporting: int, busy: float, wait: float, rows: float, fixed: float, missing_experts: bool,
    now: float, low_since: float | None,
) -> None:  # fmt: skip
    """Every decision is within the bounds, and none removes the last holder while there is demand."""
    settings = Scaling(min_replicas=0, max_replicas=40, shrink_after_s=1.0)
    snapshot = Snapshot(
        "experts-0", target, live, min(reporting, live), busy, wait, rows, missing_experts=missing_experts, fixed=fixed
    )
    decision = decide(snapshot, State(low_since=low_since), settings, now)
    assert 0 <= decision.target <= 40
    assert decision.reason
    if target > 0 and (rows > 0 or missing_experts):
        assert decision.target > 0
