"""The planner: properties that every plan has, and its balance compared with DeepSeek's EPLB on the same loads."""

from __future__ import annotations

import numpy as np
import pytest
from eplb import eplb_balancedness
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.core.experts import ExpertSet, ModelShape
from moiety.core.replica import Placement
from moiety.errors import ConfigError
from moiety.policy.placement.planner import DeploymentCapacity, PlacementPlan, held_table, plan_placement, replica_loads

LAYERS, EXPERTS = 8, 64
DEVICES, SLOTS = 16, 5  # as in EPLB: the same number of experts on each device; 16 of a layer's 80 slots are redundant


def zipf(skew: float, seed: int, layers: int = LAYERS, experts: int = EXPERTS) -> np.ndarray:
    """Returns loads [layers, experts] that sum to 1 in each layer; the order of the experts differs per layer."""
    random = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, experts + 1) ** skew
    return np.stack([random.permutation(weights) / weights.sum() for _ in range(layers)])


def devices(count: int = DEVICES, slots: int = SLOTS, layers: int = LAYERS) -> list[DeploymentCapacity]:
    """Returns equal groups with memory for copies, like EPLB's devices."""
    return [DeploymentCapacity(f"experts-{index}", slots * layers) for index in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 1.3])
def test_at_least_as_balanced_as_eplb(skew: float, seed: int) -> None:
    """On uniform and skewed loads, with equal shares for all copies as EPLB assumes."""
    expert_load = zipf(skew, seed)
    assert (
        plan_placement(expert_load, devices(), None).balancedness
        >= eplb_balancedness(expert_load, DEVICES, SLOTS) - 1e-9
    )


def test_at_least_as_balanced_as_eplb_while_the_load_drifts() -> None:
    """On drifting load, ten successive plans are as balanced as EPLB, with less than half the moves of fresh plans."""
    random = np.random.default_rng(1)
    logs = np.log(zipf(0.8, seed=2))
    placement, ours, theirs, moved = None, [], [], []
    for _ in range(10):
        logs += 0.15 * random.standard_normal(logs.shape)
        expert_load = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
        planned = plan_placement(expert_load, devices(), placement)
        afresh = plan_placement(expert_load, devices(), None)
        ours.append(planned.balancedness)
        theirs.append(eplb_balancedness(expert_load, DEVICES, SLOTS))
        if placement is not None:
            now = held_table(devices(), placement, LAYERS, EXPERTS)
            moved.append(
                (
                    sum(map(len, planned.loads.values())),
                    int((held_table(devices(), afresh.placement, LAYERS, EXPERTS) & ~now).sum()),
                )
            )
        placement = planned.placement
    assert np.mean(ours) >= np.mean(theirs) - 0.03, "within the tolerance that saves moves"
    ours_moved, afresh_moved = np.array(moved).sum(axis=0)
    assert ours_moved < 0.5 * afresh_moved


def test_hot_sets_hold_the_hottest() -> None:
    """A hot set with memory for 16 experts holds the 16 hottest of all layers and shortens the critical path."""
    expert_load = zipf(1.0, seed=3)
    groups = [DeploymentCapacity(f"experts-{index}", LAYERS * EXPERTS // 8) for index in range(8)]
    without = plan_placement(expert_load, groups, None)
    planned = plan_placement(expert_load, [*groups, DeploymentCapacity("hot-0", 16, hot=True)], without.placement)
    held = planned.placement.held["hot-0"]
    assert len(held) == 16
    assert min(expert_load[pair] for pair in held) >= np.sort(expert_load, axis=None)[-16]
    assert planned.gain > 0.1
    assert planned.changes


def test_replicas_share_the_load_of_their_group() -> None:
    """A group with three replicas gets more load than one with a single replica, so that all replicas have about as much."""
    capacities = [DeploymentCapacity("experts-0", 2 * 32, replicas=3), DeploymentCapacity("experts-1", 2 * 32)]
    expert_load = zipf(1.0, seed=4, layers=2)
    held = held_table(capacities, plan_placement(expert_load, capacities, None).placement, 2, EXPERTS)
    loads = replica_loads(expert_load, held, np.array([3, 1]))
    assert loads.shape == (2, 2)
    assert loads.max() < 1.25 * loads.min()


def test_a_balanced_placement_is_left_alone() -> None:
    """A second plan for the same load moves nothing; its epoch still grows by one, and its diff shows no moves."""
    expert_load = zipf(0.7, seed=5)
    first = plan_placement(expert_load, devices(), None, expert_bytes=10)
    again = plan_placement(expert_load, devices(), first.placement, expert_bytes=10)
    assert not again.changes
    assert again.placement.epoch == first.placement.epoch + 1
    assert again.moved_bytes == 0
    assert first.moved_bytes == 10 * sum(map(len, first.placement.held.values()))
    assert next(again.lines()) == "nothing to change: placement 1 is the best that is known for this load"


def test_the_plan_reads_like_a_diff() -> None:
    """What a deployment gains and loses is listed under its name, with + and -; signs and numbers are explained."""
    expert_load = np.array([[8.0, 7.0, 0.1, 0.1]])
    capacities = [DeploymentCapacity("experts-0", 2), DeploymentCapacity("experts-1", 2)]
    current = Placement(4, {"experts-0": ExpertSet.parse("0:0-1"), "experts-1": ExpertSet.parse("0:2-3")})
    lines = list(plan_placement(expert_load, capacities, current, expert_bytes=1000).lines())
    assert lines[0] == "placement 4 → 5: + experts to load, - experts to drop, as LAYERS:EXPERTS counted from 0"
    assert lines[1] == "experts-0"
    assert lines[2].startswith("  + 0:")
    assert lines[3].startswith("  - 0:")
    assert lines[-3].startswith("cost:    2 experts to load, 0.00 GB over all replicas")
    assert " device seconds per second" in lines[-2]


def test_too_little_memory_is_refused() -> None:
    """If groups cannot hold every expert once, the error names what they can hold."""
    with pytest.raises(ConfigError, match="2 groups have memory for 4 experts per layer, and the model has 64"):
        plan_placement(zipf(0.0, seed=6), devices(count=2, slots=2), None)


def test_deployments_that_are_not_planned_for_keep_what_they_hold() -> None:
    """Deployments that are in the current placement but not planned for keep their experts in the new one."""
    current = Placement(1, {"elsewhere": ExpertSet.parse("0:1")})
    assert plan_placement(zipf(0.0, seed=7), devices(), current).placement.held["elsewhere"] == ExpertSet.parse("0:1")


@st.composite
def loads_and_capacities(draw: st.DrawFn) -> tuple[np.ndarray, list[DeploymentCapacity], Placement | None]:
    """Draws loads, groups and hot sets that can hold the model, and no, the default or an older placement."""
    layers, experts, groups = draw(st.integers(1, 4)), draw(st.integers(2, 12)), draw(st.integers(1, 4))
    groups = min(groups, experts)
    expert_load = draw(
        st.lists(st.floats(0, 1e3, width=32), min_size=layers * experts, max_size=layers * experts).map(
            lambda values: np.array(values).reshape(layers, experts)
        )
    )
    base = -(-experts // groups)
    capacities = [
        DeploymentCapacity(f"experts-{g}", layers * (base + draw(st.integers(0, 3))), replicas=draw(st.integers(0, 3)))
        for g in range(groups)
    ]
    capacities += [
        DeploymentCapacity(f"hot-{h}", draw(st.integers(0, 9)), hot=True) for h in range(draw(st.integers(0, 2)))
    ]
    shape = ModelShape("any", layers, experts, 1, mlp=None, dtype="", vocabulary=0, max_context=0)  # type: ignore[arg-type]
    default = Placement(3, {f"experts-{g}": held for g, held in enumerate(shape.partition(groups))})
    older = plan_placement(expert_load[:, ::-1].copy(), capacities, default).placement
    return expert_load, capacities, draw(st.sampled_from([None, default, older]))


def applied(planned: PlacementPlan, current: Placement | None) -> dict[str, ExpertSet]:
    """Returns what each deployment holds after its moves."""
    after = {}
    for name in planned.placement.held:
        before = set(current.held.get(name, ExpertSet())) if current else set()
        assert before >= set(planned.drops.get(name, ())), "only held experts can be dropped"
        assert not before & set(planned.loads.get(name, ())), "held experts need no loading"
        pairs = before - set(planned.drops.get(name, ())) | set(planned.loads.get(name, ()))
        layers = {layer for layer, _ in pairs}
        after[name] = ExpertSet({k: frozenset(e for at, e in pairs if at == k) for k in layers})
    return after


@settings(deadline=None, max_examples=60)
@given(loads_and_capacities())
def test_every_plan_is_complete_fits_and_follows_from_its_moves(
    case: tuple[np.ndarray, list[DeploymentCapacity], Placement | None],
):
    """Each expert is in a group, deployments fit their memory, moves lead to the placement, no longer critical path."""
    expert_load, capacities, current = case
    planned = plan_placement(expert_load, capacities, current)
    held = held_table(capacities, planned.placement, *expert_load.shape)
    homes = [index for index, capacity in enumerate(capacities) if not capacity.hot]
    assert held[homes].any(axis=0).all()
    for capacity, pairs in zip(capacities, held, strict=True):
        assert pairs.sum() <= capacity.experts
    assert applied(planned, current) == dict(planned.placement.held)
    assert planned.placement.epoch == (1 if current is None else current.epoch + 1)
    if current is not None:
        assert planned.after <= planned.before * (1 + 1e-9)
    again = plan_placement(expert_load, capacities, current)
    assert again.placement == planned.placement, "the plan is deterministic"
