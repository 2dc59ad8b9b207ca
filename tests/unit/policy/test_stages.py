"""A change in stages ends where the whole change would, never losing an expert on the way."""

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
    """Three layers differ: two stages of two, epochs one after the other; every expert has a holder in each."""
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
    """Without a bound there is one stage, the target; where nothing changes there is none."""
    assert placement_stages(CURRENT, TARGET, 0) == (Placement(5, TARGET.held),)
    assert placement_stages(CURRENT, Placement(5, CURRENT.held), 1) == ()
