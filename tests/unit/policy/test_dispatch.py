"""Dispatch as a pure function: every assignment has exactly one place, and experts stay where they were."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.core.experts import ExpertSet
from moiety.policy.dispatch import KNEE_ROWS, NOBODY, SEVERAL, DispatchPlan, HolderTable, holders, plan_dispatch

EXPERTS = 8
Held = dict[str, frozenset[int]]

held_sets = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.frozensets(st.integers(0, EXPERTS - 1)), max_size=4
)
routings = st.lists(st.integers(0, EXPERTS - 1), max_size=60).map(lambda ids: np.array(ids, dtype=np.int64))
avoided = st.frozensets(st.sampled_from(["a", "b", "z"]))


def table_of(held: Held, version: int = 1) -> HolderTable:
    """One layer, held as told."""
    return HolderTable.build(version, {name: ExpertSet({0: ids}) for name, ids in held.items()}, 1, EXPERTS)


def plan_of(held: Held, experts: np.ndarray, avoid: frozenset[str] = frozenset()) -> DispatchPlan:
    """The plan of all assignments."""
    return plan_dispatch(table_of(held), 0, experts, np.arange(len(experts)), avoid)


@settings(deadline=None)
@given(held=held_sets, experts=routings, avoid=avoided)
def test_each_assignment_goes_to_one_holder_or_is_uncovered(held: Held, experts: np.ndarray, avoid: frozenset[str]):
    """Parts and uncovered are a partition; parts go to holders that are not avoided; nothing that could go is left."""
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
    """All rows of an expert go to one replica: two that stream the same weights gain nothing in decode."""
    planned = plan_of(held, experts, avoid)
    sets = [set(experts[part].tolist()) for part in planned.parts.values()]
    assert sum(map(len, sets)) == len(set().union(*sets))


@settings(deadline=None)
@given(held=held_sets, experts=routings)
def test_a_plan_depends_on_nothing_else(held: Held, experts: np.ndarray):
    """Same routing, same plan, in whatever order the holders became known."""
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
def test_the_table_is_what_a_plain_loop_makes(names: list[str], kinds: list[str]):
    """Sole holders and the several holders of an expert, whether replicas hold one and the same set or equal ones."""
    held = {name: ExpertSet.parse(kind) for name, kind in zip(names, kinds, strict=False)}
    table = HolderTable.build(1, held, layers=2, experts=EXPERTS)
    holders: dict[tuple[int, int], list[int]] = {}
    for index, name in enumerate(sorted(held)):
        for pair in held[name]:
            holders.setdefault(pair, []).append(index)
    assert dict(table.shared) == {pair: tuple(ids) for pair, ids in holders.items() if len(ids) > 1}
    for layer, owner in table.sole.items():
        for expert in range(EXPERTS):
            mine = holders.get((layer, expert), [])
            assert owner[expert] == (NOBODY if not mine else mine[0] if len(mine) == 1 else SEVERAL)


def test_experts_stay_with_their_replica_from_step_to_step():
    """With few rows, an expert's replica does not depend on which other experts a step happens to use."""
    held = {"a": frozenset(range(EXPERTS)), "b": frozenset(range(EXPERTS))}
    whole = plan_of(held, np.arange(EXPERTS))
    home = {int(expert): replica for replica, part in whole.parts.items() for expert in part}
    assert set(home.values()) == {"a", "b"}, "both replicas must get experts"
    for pair in ([0, 1], [3, 4], [6, 7], [2, 5]):
        planned = plan_of(held, np.array(pair))
        assert {pair[i]: replica for replica, part in planned.parts.items() for i in part} == {e: home[e] for e in pair}


def test_a_group_may_have_more_replicas_than_experts_of_a_layer():
    """With two experts a layer and eight replicas, layers take turns: no replica is left without work."""
    held = {name: ExpertSet.block(8, [0, 1]) for name in "abcdefgh"}
    table = HolderTable.build(1, held, layers=8, experts=EXPERTS)
    used = [plan_dispatch(table, layer, np.array([0, 1]), np.arange(2)).parts.keys() for layer in range(8)]
    assert set().union(*used) == set(held)
    assert {len(replicas) for replicas in used} == {2}


def test_a_busy_replica_sheds_experts_that_others_hold():
    """An expert leaves its home where that has more to do, by as much as the expert costs."""
    hot = np.zeros(40 * KNEE_ROWS, dtype=np.int64)  # expert 0, which only `a` holds
    held = {"a": frozenset({0, 2, 4}), "b": frozenset({2, 4})}
    assert plan_of(held, np.array([2])).parts.keys() == plan_of(held, np.array([4])).parts.keys() == {"a"}, "at home"
    assert plan_of(held, np.array([2, 4])).parts.keys() == {"a", "b"}, "one each, rather than both at home"
    planned = plan_of(held, np.concatenate([hot, [2, 4]]))
    assert sorted(planned.parts["b"].tolist()) == [len(hot), len(hot) + 1]


def test_an_avoided_sole_holder_leaves_its_experts_uncovered():
    """Avoiding is absolute: whoever asks decides whether a slow holder is better than none."""
    planned = plan_of({"a": frozenset({0}), "b": frozenset({1})}, np.array([0, 1, 0]), frozenset({"a"}))
    assert planned.uncovered.tolist() == [0, 2]
    assert planned.parts["b"].tolist() == [1]


def test_only_the_assignments_asked_for_are_planned():
    """A retry plans its own rows, by their places in the whole layer."""
    table = table_of({"a": frozenset(range(EXPERTS))})
    planned = plan_dispatch(table, 0, np.array([0, 1, 2, 3]), np.array([1, 3]))
    assert planned.parts["a"].tolist() == [1, 3]


def test_what_the_model_lacks_is_ignored():
    """A replica that claims layers or experts beyond the model's shape is used for the rest."""
    table = HolderTable.build(1, {"a": ExpertSet.parse("0-5:0-99")}, layers=2, experts=3)
    assert table.uncovered() == []
    assert [len(owner) for owner in table.sole.values()] == [3, 3]


@pytest.mark.parametrize(("held", "missing"), [({}, [(0, 0), (0, 1)]), ({"a": ExpertSet.parse("0:1")}, [(0, 0)])])
def test_the_table_names_what_nobody_holds(held: dict[str, ExpertSet], missing: list[tuple[int, int]]):
    """A router is ready once this list is empty."""
    assert HolderTable.build(1, held, layers=1, experts=2).uncovered() == missing


def _sets(**held: str) -> dict[str, ExpertSet]:
    return {replica: ExpertSet.parse(text) for replica, text in held.items()}


def test_what_is_leaving_is_asked_for_only_where_nobody_holds_it():
    """Expert 1 leaves `a` for `b`, which has it; expert 2 leaves for nobody that is there: only that is still asked for."""
    asked = holders(_sets(a="0:0", b="0:1"), _sets(a="0:1-2", b=""), {"a": 4, "b": 4})
    assert asked.held == _sets(a="0:0,2", b="0:1")
    assert asked.epoch == 3  # what leaves `a` by placement 4 is still needed


def test_a_placement_is_taken_in_when_every_replica_has_followed():
    """The epoch acknowledged is that of the last replica to follow; none is, where there are no replicas."""
    assert holders(_sets(a="0:0", b="0:1"), _sets(a="0:1"), {"a": 4, "b": 3}).epoch == 3
    assert holders(_sets(a="0:0", b="0:1"), _sets(a="0:1"), {"a": 4, "b": 4}).epoch == 4
    assert holders({}, {}, {}).epoch == 0


def test_experts_whose_holders_are_all_named():
    """Of a layer's experts those that nobody but the named replicas holds; one without a holder is not among them."""
    table = HolderTable.build(1, _sets(a="0:0-1", b="0:1-2", c="0:3"), 1, 5)
    assert table.held_only_by(0, {"a"}).tolist() == [True, False, False, False, False]
    assert table.held_only_by(0, {"a", "b"}).tolist() == [True, True, True, False, False]
    assert not table.held_only_by(0, ()).any()
