"""A change of placement in stages ends at the target, and every expert has a holder in each stage."""

from __future__ import annotations

from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement
from moiety.policy.placement.stages import placement_stages

CURRENT = Placement(4, {"a": ExpertSet.parse("0-4:0-1"), "b": ExpertSet.parse("0-4:2-3"), "hot-0": ExpertSet()})
TARGET = Placement(
    5,
    {
        "a": ExpertSet.parse("0-1:2-3;2-4:0-1"),
        "b": ExpertSet.parse("0-1:0-1;2-4:2-3"),
        "hot-0": ExpertSet.parse("4:0"),
    },
)


def test_each_stage_changes_a_few_layers_and_the_last_is_the_target() -> None:
    """Three changed layers make two stages of at most two, with consecutive epochs; every expert has a holder in each."""
    found = placement_stages(CURRENT, TARGET, 2)
    assert [stage.epoch for stage in found] == [5, 6]
    assert found[-1].held == TARGET.held
    assert found[0].held["a"] == ExpertSet.parse("0-1:2-3;2-4:0-1")
    assert len(found[0].held["hot-0"]) == 0
    for stage in found:
        held = ExpertSet()
        for experts in stage.held.values():
            held |= experts
        assert held == ExpertSet.parse("0-4:0-3")


def test_all_at_once() -> None:
    """Without a limit there is one stage, the target; without a change there is none."""
    assert placement_stages(CURRENT, TARGET, 0) == (Placement(5, TARGET.held),)
    assert placement_stages(CURRENT, Placement(5, CURRENT.held), 1) == ()
