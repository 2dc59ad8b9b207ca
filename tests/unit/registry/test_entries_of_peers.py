"""Entries as they are stored: the costs and kinds of replicas, and sets of experts, which are bounded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moiety.core.experts import ExpertSet
from moiety.core.load import BatchCost, ExpertDemand
from moiety.core.replica import ReplicaState, Role
from moiety.registry.entries import demand_from_fields, demand_to_fields, replica_from_json, replica_to_json
from moiety.testing import fake_replica


def test_costs_of_each_kind_come_back():
    """A router's fits, one per kind of replica, are read as they were written; without any, none are."""
    costs = tuple(
        BatchCost(0.001, 1e-9, 1e-4, 1_000_000, 100, 0.05, kind) for kind in ("cpu, float32", "NVIDIA H200, int8")
    )
    demand = ExpertDemand(((1, 2),), ((1, 1),), time=5.0, costs=costs)
    assert demand_from_fields(demand_to_fields(demand)) == demand
    assert demand_from_fields(demand_to_fields(replace(demand, costs=()))).costs == ()


def test_a_replica_says_its_kind_and_that_it_is_sick():
    """Readers know by which costs to judge a replica, and which to avoid."""
    replica = replace(fake_replica("a", Role.EXPERT, 1), kind="cpu, float32", state=ReplicaState.SICK)
    assert replica_from_json(replica_to_json(replica)) == replica


def test_a_set_of_experts_in_an_entry_is_bounded():
    """An entry that names more experts than any model has is refused, before that much is allocated."""
    entry = json.loads(replica_to_json(fake_replica("a", Role.EXPERT, 1, held=ExpertSet.parse("0:0"))))
    with pytest.raises(ValueError, match=r"field held = '0-30000:0-3000': layer '0-30000': must be 0 to 1023"):
        replica_from_json(json.dumps({**entry, "held": "0-30000:0-3000"}))
