"""Dispatch as a pure function: every assignment goes to exactly one replica, and experts keep their replica."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.core.experts import ExpertSet
from moiety.policy.dispatch import (
    KNEE_ROWS,
    MANY_HOLDERS,
    NO_HOLDER,
    DispatchPlan,
    HolderTable,
    ReplicaHolding,
    holders,
    plan_dispatch,
)

EXPERTS = 8
Held = dict[str, frozenset[int]]

held_sets = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.frozensets(st.integers(0, EXPERTS - 1)), max_size=4
)
routings = st.lists(st.integers(0, EXPERTS - 1), max_size=60).map(lambda ids: np.array(ids, dtype=np.int64))
avoided = st.frozensets(st.sampled_from(["a", "b", "z"]))


def table_of(held: Held, version: int = 1) -> HolderTable:
    """Returns the table of one layer with these holders."""
    return HolderTable.build(version, {name: ExpertSet({0: ids}) for name, ids in held.items()}, 1, EXPERTS)


def plan_of(held: Held, experts: np.ndarray, avoid: frozenset[str] = frozenset()) -> DispatchPlan:
    """Returns the plan of all assignments."""
    return plan_dispatch(table_of(held), 0, experts, np.arange(len(experts)), avoid)


@settings(deadline=None)
@given(held=held_sets, experts=routings, avoid=avoided)
def test_each_assignment_goes_to_one_holder_or_is_uncovered(held: Held, experts: np.ndarray, avoid: frozenset[str]):
    """Parts and uncovered are a partition; parts go to allowed holders; no uncovered expert has an allowed holder."""
    planned = plan_of(held, experts, avoid)
    everything = np.concatenate([*planned.parts.values(), planned.uncovered])
    assert sorted(everything.tolist()) == list(range(len(experts)))
    for replica, part in planned.parts.items():
        assert len(part)
        assert replica not in avoid
        assert set(experts[part].tolist()) <= held[replica]
        assert np.all(np.diff(part) > 0), "rows and k offsets are built from ascending assignments"
    allowed = frozenset().union(*(ids for replica, ids in held.items() if replica not in avoid))
    assert not allowed & set(experts[planned.uncovered].tolist())


@settings(deadline=None)
@given(held=held_sets, experts=routings, avoid=avoided)
def test_an_expert_is_never_split(held: Held, experts: np.ndarray, avoid: frozenset[str]):
    """All rows of an expert go to one replica."""
    planned = plan_of(held, experts, avoid)
    sets = [set(experts[part].tolist()) for part in planned.parts.values()]
    assert sum(map(len, sets)) == len(set().union(*sets))


@settings(deadline=None)
@given(held=held_sets, experts=routings)
def test_a_plan_does_not_depend_on_the_order_of_holders(held: Held, experts: np.ndarray):
    """The same routing gives the same plan, in whatever order the holders became known."""
    first = plan_of(held, experts)
    again = plan_of(dict(reversed(held.items())), experts)
    assert first.parts.keys() == again.parts.keys()
    for replica, part in first.parts.items():
        assert part.tolist() == again.parts[replica].tolist()


@settings(deadline=None)
@given(
    names=st.lists(st.sampled_from("abcdefg"), max_size=7, unique=True),
    kinds=st.lists(st.sampled_from(["0:0-3", "0:2-5;1:0", "1:1-7", "0-1:0-7", ""]), min_size=7, max_size=7),
)
def test_the_table_agrees_with_a_plain_loop(names: list[str], kinds: list[str]):
    """Sole and shared holders are those of a plain loop, whether replicas share one set object or have equal ones."""
    held = {name: ExpertSet.parse(kind) for name, kind in zip(names, kinds, strict=False)}
    table = HolderTable.build(1, held, layers=2, experts=EXPERTS)
    holders: dict[tuple[int, int], list[int]] = {}
    for index, name in enumerate(sorted(held)):
        for pair in held[name]:
            holders.setdefault(pair, []).append(index)
    assert dict(table.shared) == {pair: tuple(ids) for pair, ids in holders.items() if len(ids) > 1}
    for layer, owner in table.sole.items():
        for expert in range(EXPERTS):
            indices = holders.get((layer, expert), [])
            assert owner[expert] == (NO_HOLDER if not indices else indices[0] if len(indices) == 1 else MANY_HOLDERS)


def test_experts_stay_with_their_replica_from_step_to_step():
    """With few rows, an expert's replica does not depend on the other experts of the step."""
    held = {"a": frozenset(range(EXPERTS)), "b": frozenset(range(EXPERTS))}
    whole = plan_of(held, np.arange(EXPERTS))
    home = {int(expert): replica for replica, part in whole.parts.items() for expert in part}
    assert set(home.values()) == {"a", "b"}, "both replicas must get experts"
    for pair in ([0, 1], [3, 4], [6, 7], [2, 5]):
        planned = plan_of(held, np.array(pair))
        assert {pair[i]: replica for replica, part in planned.parts.items() for i in part} == {e: home[e] for e in pair}


def test_a_group_may_have_more_replicas_than_experts_of_a_layer():
    """With two experts per layer and eight replicas, different layers use different replicas: all get work."""
    held = {name: ExpertSet.uniform(8, [0, 1]) for name in "abcdefgh"}
    table = HolderTable.build(1, held, layers=8, experts=EXPERTS)
    used = [plan_dispatch(table, layer, np.array([0, 1]), np.arange(2)).parts.keys() for layer in range(8)]
    assert set().union(*used) == set(held)
    assert {len(replicas) for replicas in used} == {2}


def test_a_busy_replica_sheds_experts_that_others_hold():
    """An expert goes to another holder if its preferred one has more load, by at least the cost of the expert."""
    hot = np.zeros(40 * KNEE_ROWS, dtype=np.int64)  # expert 0, which only `a` holds
    held = {"a": frozenset({0, 2, 4}), "b": frozenset({2, 4})}
    assert plan_of(held, np.array([2])).parts.keys() == plan_of(held, np.array([4])).parts.keys() == {"a"}, "at home"
    assert plan_of(held, np.array([2, 4])).parts.keys() == {"a", "b"}, "one each, rather than both at home"
    planned = plan_of(held, np.concatenate([hot, [2, 4]]))
    assert sorted(planned.parts["b"].tolist()) == [len(hot), len(hot) + 1]


def test_an_avoided_sole_holder_leaves_its_experts_uncovered():
    """An avoided replica gets nothing, even as the only holder: the caller decides whether to call it after all."""
    planned = plan_of({"a": frozenset({0}), "b": frozenset({1})}, np.array([0, 1, 0]), frozenset({"a"}))
    assert planned.uncovered.tolist() == [0, 2]
    assert planned.parts["b"].tolist() == [1]


def test_only_the_assignments_asked_for_are_planned():
    """A retry plans only its own rows, as indices into the whole layer."""
    table = table_of({"a": frozenset(range(EXPERTS))})
    planned = plan_dispatch(table, 0, np.array([0, 1, 2, 3]), np.array([1, 3]))
    assert planned.parts["a"].tolist() == [1, 3]


def test_what_the_model_lacks_is_ignored():
    """A replica that claims layers or experts beyond the model's shape is used for the valid ones."""
    table = HolderTable.build(1, {"a": ExpertSet.parse("0-5:0-99")}, layers=2, experts=3)
    assert table.uncovered() == []
    assert [len(owner) for owner in table.sole.values()] == [3, 3]


@pytest.mark.parametrize(("held", "missing"), [({}, [(0, 0), (0, 1)]), ({"a": ExpertSet.parse("0:1")}, [(0, 0)])])
def test_the_table_lists_experts_without_a_holder(held: dict[str, ExpertSet], missing: list[tuple[int, int]]):
    """`uncovered` lists every (layer, expert) without a holder; a router is ready once it is empty."""
    assert HolderTable.build(1, held, layers=1, experts=2).uncovered() == missing


def _following(held: str, leaving: str, epoch: int) -> ReplicaHolding:
    return ReplicaHolding(ExpertSet.parse(held), ExpertSet.parse(leaving), epoch)


def test_a_leaving_expert_is_called_only_while_no_replica_holds_it():
    """Expert 1 leaves `a` and `b` holds it; expert 2 leaves `a` and has no other holder: only 2 is still called there."""
    current = holders({"a": _following("0:0", "0:1-2", 4), "b": _following("0:1", "", 4)})
    assert current.held == {"a": ExpertSet.parse("0:0,2"), "b": ExpertSet.parse("0:1")}
    assert current.epoch == 3  # an expert that leaves `a` by placement 4 is still needed


def test_a_placement_is_complete_when_every_replica_has_followed():
    """The epoch is that of the last replica to follow, and 0 without replicas."""
    first = _following("0:0", "0:1", 4)
    assert holders({"a": first, "b": _following("0:1", "", 3)}).epoch == 3
    assert holders({"a": first, "b": _following("0:1", "", 4)}).epoch == 4
    assert holders({}).epoch == 0


def test_experts_held_only_by_the_named_replicas():
    """`held_only_by` marks experts whose holders are all among the named replicas, but none without a holder."""
    held = {"a": ExpertSet.parse("0:0-1"), "b": ExpertSet.parse("0:1-2"), "c": ExpertSet.parse("0:3")}
    table = HolderTable.build(1, held, 1, 5)
    assert table.held_only_by(0, {"a"}).tolist() == [True, False, False, False, False]
    assert table.held_only_by(0, {"a", "b"}).tolist() == [True, True, True, False, False]
    assert not table.held_only_by(0, ()).any()
