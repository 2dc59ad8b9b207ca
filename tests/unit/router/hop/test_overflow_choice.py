"""Which experts' rows may go elsewhere: those of groups with the policy `backup`, once all holders are overrun."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from moiety.core.experts import ExpertSet
from moiety.policy.dispatch import HolderTable
from moiety.router.hop.overflow import REMEMBER_S, OverrunExperts, OverrunReplicas

HELD = {"a": "0:0-1", "b": "0:2-3", "b2": "0:2-3", "h": "0:0,2"}
DEPLOYMENTS = {"a": "experts-0", "b": "experts-1", "b2": "experts-1", "h": "hot-0"}
BOUND_MS = 5.0


class Fleet:
    """A holder table of `held` (replica -> experts), and queue waits that the test reports itself."""

    def __init__(self, backup: set[str], held: Mapping[str, str] = HELD, slices: int = 1) -> None:
        self.now = 0.0
        self.queues = OverrunReplicas(BOUND_MS, lambda: self.now)
        self.deployments = dict(DEPLOYMENTS)
        self.publish(held)
        self.overrun = OverrunExperts(
            self.queues, lambda: self.table, lambda name: self.deployments.get(name, ""), backup.__contains__, slices
        )

    def publish(self, held: Mapping[str, str]) -> None:
        """Publishes the next table, of one layer with four experts."""
        version = self.table.version + 1 if hasattr(self, "table") else 1
        self.table = HolderTable.build(version, {name: ExpertSet.parse(text) for name, text in held.items()}, 1, 4)

    def spared(self, *slow: str) -> list[int]:
        """Returns the experts whose rows may go elsewhere after only these replicas reported long queues."""
        for replica in DEPLOYMENTS:
            self.queues.record(replica, BOUND_MS * (2 if replica in slow else 0))
        masks = self.overrun(0)
        return [] if masks is None else np.flatnonzero(masks.spared).tolist()


def test_only_groups_with_backup_are_spared() -> None:
    """Experts of a group with `backup` are spared, but only once all their holders are overrun; other rows wait."""
    fleet = Fleet({"experts-1"})
    assert fleet.spared() == []
    assert fleet.spared("a", "b") == []
    assert fleet.spared("a", "b", "b2") == [3]
    assert fleet.spared("a", "b", "b2", "h") == [2, 3]
    assert (masks := fleet.overrun(0)) is not None
    assert masks.overrun.all(), "experts whose rows wait get no rerouted rows either"
    fleet.now += REMEMBER_S
    assert fleet.overrun(0) is None
    assert Fleet(set()).spared("a", "b", "b2", "h") == []
    assert Fleet({"experts-0", "experts-1"}).spared("a", "b", "b2", "h") == [0, 1, 2, 3]


def test_the_policy_of_a_hot_set_does_not_count() -> None:
    """The policy of the experts' group decides, not the hot set's; if no group holds the expert, rows wait."""
    assert Fleet({"hot-0"}).spared("a", "b", "b2", "h") == []
    fleet = Fleet({"experts-0", "hot-0"})
    assert fleet.spared("a", "h") == [0, 1]
    fleet.publish({"b": HELD["b"], "h": HELD["h"]})
    assert fleet.spared("h") == []


def test_rows_of_a_replica_that_has_just_left_wait() -> None:
    """Its deployment is unknown, so its rows wait for the next table, even if "" would be spared."""
    fleet = Fleet({"experts-0", ""})
    del fleet.deployments["a"]
    assert fleet.spared("a", "h") == []


def test_an_expert_of_two_groups_waits_unless_both_have_backup() -> None:
    """While a rebalance moves an expert, two groups hold it; both must have `backup`."""
    held = {**HELD, "b": "0:1-3"}
    assert Fleet({"experts-1"}, held).spared("a", "b", "b2", "h") == [2, 3]
    assert Fleet({"experts-0", "experts-1"}, held).spared("a", "b", "b2", "h") == [0, 1, 2, 3]


@pytest.mark.parametrize(("backup", "spared"), [({"experts-0"}, []), ({"experts-0", "experts-1"}, [0, 1])])
def test_a_sliced_expert_is_spared_as_a_whole(backup: set[str], spared: list[int]) -> None:
    """One overrun slice makes the expert overrun, but the groups of all its slices must have `backup`."""
    assert Fleet(backup, {"a": "0:0,2", "b": "0:1,3"}, slices=2).spared("a") == spared
