"""Which experts' rows may go elsewhere: those of groups that say so, once no holder can take more."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from moiety.core.experts import ExpertSet
from moiety.policy.dispatch import HolderTable
from moiety.router.hop.overflow import REMEMBER_S, OverrunExperts, QueueWaits

HELD = {"a": "0:0-1", "b": "0:2-3", "b2": "0:2-3", "h": "0:0,2"}
DEPLOYMENTS = {"a": "experts-0", "b": "experts-1", "b2": "experts-1", "h": "hot-0"}
BOUND_MS = 5.0


class Fleet:
    """A table of `held`, replica -> experts, and queues that are told about by hand."""

    def __init__(self, backup: set[str], held: Mapping[str, str] = HELD, slices: int = 1) -> None:
        self.now = 0.0
        self.queues = QueueWaits(BOUND_MS, lambda: self.now)
        self.deployments = dict(DEPLOYMENTS)
        self.publish(held)
        self.overrun = OverrunExperts(
            self.queues, lambda: self.table, lambda one: self.deployments.get(one, ""), backup.__contains__, slices
        )

    def publish(self, held: Mapping[str, str]) -> None:
        """The next table, of one layer with four experts."""
        version = self.table.version + 1 if hasattr(self, "table") else 1
        self.table = HolderTable.build(version, {one: ExpertSet.parse(text) for one, text in held.items()}, 1, 4)

    def spared(self, *slow: str) -> list[int]:
        """Experts whose rows may go elsewhere after these replicas, and no others, told of long queues."""
        for replica in DEPLOYMENTS:
            self.queues.answered(replica, BOUND_MS * (2 if replica in slow else 0))
        masks = self.overrun(0)
        return [] if masks is None else np.flatnonzero(masks.spared).tolist()


def test_rows_of_a_group_that_waits_wait() -> None:
    """Only the experts of the group that says backup are spared, and only once every holder of theirs is overrun."""
    fleet = Fleet({"experts-1"})
    assert fleet.spared() == []
    assert fleet.spared("a", "b") == []
    assert fleet.spared("a", "b", "b2") == [3]
    assert fleet.spared("a", "b", "b2", "h") == [2, 3]
    assert (masks := fleet.overrun(0)) is not None
    assert masks.overrun.all(), "nor is a row sent to those that wait"
    fleet.now += REMEMBER_S
    assert fleet.overrun(0) is None
    assert Fleet(set()).spared("a", "b", "b2", "h") == []
    assert Fleet({"experts-0", "experts-1"}).spared("a", "b", "b2", "h") == [0, 1, 2, 3]


def test_a_hot_set_has_no_say() -> None:
    """It does as the groups of its experts do, whatever it is told; where its group is lost, rows wait."""
    assert Fleet({"hot-0"}).spared("a", "b", "b2", "h") == []
    fleet = Fleet({"experts-0", "hot-0"})
    assert fleet.spared("a", "h") == [0, 1]
    fleet.publish({"b": HELD["b"], "h": HELD["h"]})
    assert fleet.spared("h") == []


def test_a_replica_that_has_just_left_says_nothing() -> None:
    """Its rows wait for the next table, whatever is the rule for groups that are not named."""
    fleet = Fleet({"experts-0", ""})
    del fleet.deployments["a"]
    assert fleet.spared("a", "h") == []


def test_an_expert_of_two_groups_waits_unless_both_say_otherwise() -> None:
    """As while a rebalance moves it."""
    held = {**HELD, "b": "0:1-3"}
    assert Fleet({"experts-1"}, held).spared("a", "b", "b2", "h") == [2, 3]
    assert Fleet({"experts-0", "experts-1"}, held).spared("a", "b", "b2", "h") == [0, 1, 2, 3]


@pytest.mark.parametrize(("backup", "spared"), [({"experts-0"}, []), ({"experts-0", "experts-1"}, [0, 1])])
def test_a_sliced_expert_goes_whole(backup: set[str], spared: list[int]) -> None:
    """Its slices lie in several groups: one overrun slice is enough, but all of the groups must agree."""
    assert Fleet(backup, {"a": "0:0,2", "b": "0:1,3"}, slices=2).spared("a") == spared
