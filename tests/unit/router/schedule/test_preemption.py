"""A sequence is preempted only if that lets a higher one in, and higher ones never make room for lower ones."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from scheduler_support import BLOCK_TOKENS, Bench, sequence

from moiety.router.sequence.sequence import Sequence


def test_nothing_is_preempted_where_its_blocks_would_not_suffice():
    """A needs 49 more of 100 blocks for its prompt, B holds 40, C needs 60: without B there would be 50 for C."""
    a = sequence("a", 50 * BLOCK_TOKENS)
    b = sequence("b", 40 * BLOCK_TOKENS, priority=5)
    bench = Bench(a, b, budget=BLOCK_TOKENS)
    bench.admitted()
    bench.cache.grow(b.table, 40 * BLOCK_TOKENS)
    bench.cache.grow(a.table, BLOCK_TOKENS)
    bench.add(sequence("c", 60 * BLOCK_TOKENS))
    assert bench.admitted() == []
    assert bench.running == ["a", "b"]
    assert b.table.size == 40
    bench.scheduler.remove(a)
    assert bench.admitted() == ["c"]
    assert bench.running == ["c"], "without A, B's blocks suffice"


def test_blocks_that_another_sequence_holds_too_count_as_kept():
    """B and C share a prompt of 20 blocks. Without both there would be room for D, without B alone there would not."""
    prompt = 20 * BLOCK_TOKENS
    b = sequence("b", prompt, priority=5)
    b.siblings = (b.sibling(1, b.span),)
    bench = Bench(b, blocks=30, budget=prompt)
    bench.step()
    bench.scheduler.fork(b)
    assert bench.running == ["b", "b"]
    bench.add(sequence("d", 25 * BLOCK_TOKENS))
    assert bench.admitted() == ["d"]
    assert bench.running == ["d"]


class Preemption(RuleBasedStateMachine):
    """A scheduler with little memory, under any mix of requests. The twin is arithmetic on who runs before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(slots=4, budget=12, blocks=12, revision="r")
        self.open: list[Sequence] = []
        self.names = 0

    @rule(
        prompt=st.integers(1, 30),
        output=st.integers(1, 14),
        priority=st.integers(0, 2),
        tenant=st.sampled_from("xy"),
        shared=st.booleans(),
    )
    def submit(self, prompt: int, output: int, priority: int, tenant: str, shared: bool) -> None:
        self.names += 1
        one = sequence(str(self.names), prompt, max_tokens=output, priority=priority, tenant=tenant)
        if shared:
            one.tokens = [7] * prompt  # the beginning of all shared prompts
        self.bench.add(one)
        self.open.append(one)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.bench.scheduler.remove(gone := data.draw(st.sampled_from(self.open)))
        self.open.remove(gone)

    @rule(steps=st.integers(1, 4))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.admit()
            before = list(self.bench.scheduler.running)
            advanced = self.bench.step()
            gone = [one for one in before if one not in self.bench.scheduler.running and one.table.size == 0]
            preempted = [one for one in gone if one in self.bench.scheduler.waiting]
            assert preempted == [one for one in before if one in preempted]
            if preempted:
                lowest = min(one.rank for one in preempted)
                assert any(item.sequence.rank < lowest for item in advanced.scheduled), "preempted for nobody"
            self.open = [one for one in self.open if one.generated < one.sampling.max_tokens]

    def admit(self) -> None:
        scheduler = self.bench.scheduler
        while True:
            before, first = list(scheduler.running), scheduler.waiting.first()
            admitted = scheduler.admit_next()
            preempted = [one for one in before if one not in scheduler.running]
            assert admitted in (first, None)
            assert before[len(before) - len(preempted) :] == preempted, "the last in rank make room first"
            if admitted is None:
                assert not preempted, "preempted in vain"
                return
            assert all(one.priority > admitted.priority for one in preempted)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.bench.check()
        running, waiting = self.bench.scheduler.running, self.bench.scheduler.waiting
        assert running == sorted(running, key=lambda one: one.rank)
        assert sorted(map(id, self.open)) == sorted(map(id, (*running, *waiting)))

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.open:
                break
            self.run(1)
        assert not self.open, "a sequence that fits into the cache starves"
        assert self.bench.cache.free_blocks == 12


QUICK = settings(max_examples=80, stateful_step_count=25, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    "effort", [QUICK, pytest.param(settings(QUICK, max_examples=2000, derandomize=False), marks=pytest.mark.slow)]
)
def test_preemption_is_never_in_vain_and_nobody_starves(effort: settings):
    """Under any requests: ranks are kept, no block is lost, each request that fits ends, and nobody gives way for nothing."""
    run_state_machine_as_test(Preemption, settings=effort)
