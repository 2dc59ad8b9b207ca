"""Dispatch while replicas come, go, change what they hold and are avoided: where each expert's rows go at every moment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from moiety.core.experts import ExpertSet
from moiety.policy.dispatch import HolderTable, plan_dispatch

LAYERS, EXPERTS = 2, 6
NAMES = st.sampled_from("abcde")
HELD = st.dictionaries(
    st.integers(0, LAYERS - 1), st.frozensets(st.integers(0, EXPERTS - 1), min_size=1), max_size=LAYERS
)


class Changes(RuleBasedStateMachine):
    """The twin is the plain mapping replica -> experts; `avoided` are the replicas whose breakers are open."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, ExpertSet] = {}
        self.avoided: set[str] = set()
        self.version = 0
        self.rebuild()

    def rebuild(self) -> None:
        self.version += 1
        self.table = HolderTable.build(self.version, self.held, LAYERS, EXPERTS)

    @rule(name=NAMES, held=HELD)
    def hold(self, name: str, held: dict[int, frozenset[int]]) -> None:
        self.held[name] = ExpertSet(held)
        self.rebuild()

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        self.held.pop(name, None)
        self.rebuild()

    @rule(name=NAMES)
    def avoid(self, name: str) -> None:
        self.avoided.add(name)

    @rule(name=NAMES)
    def trust(self, name: str) -> None:
        self.avoided.discard(name)

    def home(self, layer: int, expert: int, avoid: frozenset[str]) -> str | None:
        """Returns the replica that gets a single row of this expert."""
        planned = plan_dispatch(self.table, layer, np.array([expert]), np.arange(1), avoid)
        return next(iter(planned.parts), None)

    @rule(
        layer=st.integers(0, LAYERS - 1),
        routing=st.lists(st.integers(0, EXPERTS - 1), max_size=200),
        data=st.data(),
    )
    def plan(self, layer: int, routing: list[int], data: st.DataObject) -> None:
        experts = np.array(routing, dtype=np.int64)
        chosen = np.array(sorted(data.draw(st.sets(st.integers(0, max(0, len(routing) - 1))))), dtype=np.int64)
        assignments = chosen[chosen < len(routing)]
        planned = plan_dispatch(self.table, layer, experts, assignments, self.avoided)
        again = plan_dispatch(self.table, layer, experts, assignments, set(self.avoided))
        assert {name: part.tolist() for name, part in planned.parts.items()} == {
            name: part.tolist() for name, part in again.parts.items()
        }, "the same routing goes to the same replicas"
        everything = np.concatenate([*planned.parts.values(), planned.uncovered])
        assert sorted(everything.tolist()) == assignments.tolist(), "each assignment once"
        for name, part in planned.parts.items():
            assert name not in self.avoided
            assert set(experts[part].tolist()) <= self.held[name].layer(layer)
        for expert in set(experts[planned.uncovered].tolist()):
            assert not self.holders(layer, expert)

    def holders(self, layer: int, expert: int) -> list[str]:
        return sorted(name for name in self.held if name not in self.avoided and (layer, expert) in self.held[name])

    @invariant()
    def one_expert_goes_to_one_of_its_holders_and_moves_only_when_they_change(self) -> None:
        avoided = frozenset(self.avoided)
        others = frozenset(name for name in self.held if name not in self.avoided)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                home, allowed = self.home(layer, expert, avoided), self.holders(layer, expert)
                assert home in allowed if allowed else home is None
                if len(allowed) == 1:
                    assert home == allowed[0], "the only holder gets its experts"
                unrelated = others - set(allowed)
                assert self.home(layer, expert, avoided | unrelated) == home, "a breaker elsewhere moves nothing"


QUICK = settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    "effort", [QUICK, pytest.param(settings(QUICK, max_examples=1000, derandomize=False), marks=pytest.mark.slow)]
)
def test_dispatch_follows_every_change(effort: settings):
    """Each assignment goes to exactly one holder that is not avoided, or is uncovered; experts move only with their holders."""
    run_state_machine_as_test(Changes, settings=effort)
