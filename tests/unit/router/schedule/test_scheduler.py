"""What runs next: slots, blocks and token budget are kept to, everybody gets a turn, and nobody is stuck."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.core.expert_backend import CallClass
from moiety.core.sampling import Sampling
from moiety.router.cache.cache_spec import CacheSpec, LayerSpec
from moiety.router.cache.kv_cache import KVCache
from moiety.router.schedule.retry_hint import AdmissionRate
from moiety.router.schedule.scheduler import Scheduler
from moiety.router.schedule.waiting import WaitingQueue
from moiety.router.sequence.sequence import Sequence
from moiety.router.sequence.step_plan import Scheduled, StepPlan

SPEC = CacheSpec({0: LayerSpec(1, 2, 2, torch.float32)})
BLOCK_TOKENS = 4


def sequence(name: str, prompt: int = 1, *, computed: int = 0, max_tokens: int = 4, **options: object) -> Sequence:
    """A request with `prompt` tokens of its own, of which `computed` are in the cache."""
    return Sequence(
        request_id=name,
        tokens=[sum(name.encode())] * prompt,
        prompt_tokens=prompt,
        sampling=Sampling(max_tokens=max_tokens),
        stop_ids=frozenset(),
        emit=lambda _: None,
        computed=computed,
        **options,  # type: ignore[arg-type]
    )


class Bench:
    """A scheduler, and the steps done on it."""

    def __init__(self, *sequences: Sequence, slots: int = 8, budget: int = 10, blocks: int = 100):
        memory = blocks * BLOCK_TOKENS * SPEC.bytes_per_token
        self.cache = KVCache(SPEC, memory, torch.device("cpu"), block_tokens=BLOCK_TOKENS)
        self.scheduler = Scheduler(self.cache, slots, budget)
        self.add(*sequences)

    def add(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.scheduler.add(one)

    def admitted(self) -> list[str]:
        return names(self.scheduler.admit())

    @property
    def running(self) -> list[str]:
        return names(self.scheduler.running)

    def plan(self) -> StepPlan:
        """The next step's plan; everything in it has its blocks."""
        plan = self.scheduler.plan_step()
        for item in plan.scheduled:
            assert item.sequence.table.count * BLOCK_TOKENS >= item.sequence.computed + item.count
        self.check()
        return plan

    def step(self) -> StepPlan:
        """Admits, and does one step as an engine would, sampling a token for whom it reaches the end of."""
        self.scheduler.admit()
        plan = self.plan()
        for item in plan.scheduled:
            item.sequence.computed += item.count
            self.cache.commit(item.sequence.table, item.sequence.tokens, item.sequence.computed, item.sequence.tenant)
            if item.samples:
                item.sequence.tokens.append(1)
                if item.sequence.generated == item.sequence.sampling.max_tokens:
                    self.scheduler.remove(item.sequence)
        self.check()
        return plan

    def check(self) -> None:
        self.cache.check_integrity(one.table for one in self.scheduler.running)


def names(sequences: Iterable[Sequence]) -> list[str]:
    """Their request ids."""
    return [one.request_id for one in sequences]


def told(plan: StepPlan) -> list[tuple[str, int, bool]]:
    """(request, tokens, whether its next token is sampled)."""
    return [(item.sequence.request_id, item.count, item.samples) for item in plan.scheduled]


# A step ----------------------------------------------------------------------------------------------------------


def test_decode_goes_first_and_prompts_get_what_is_left():
    """Every running stream gets its token; prompts are cut to the budget, oldest first, and sample when complete."""
    bench = Bench(sequence("decoding", 2), sequence("long", 20), sequence("short", 3), sequence("more", 3))
    assert told(bench.step()) == [("decoding", 2, True), ("long", 8, False)]
    plan = bench.step()
    assert plan.call_class is CallClass.PREFILL
    assert told(plan) == [("decoding", 1, True), ("long", 9, False)]
    assert told(bench.plan()) == [("decoding", 1, True), ("long", 3, True), ("short", 3, True), ("more", 3, True)]


def test_a_step_of_single_tokens_is_decode():
    """The class of a step's calls is decode only when all its sequences are decoding."""
    bench = Bench(sequence("a", 5), sequence("b", 5))
    assert bench.step().call_class is CallClass.PREFILL
    assert bench.step().call_class is CallClass.DECODE


def test_a_plan_without_some_is_the_same_for_the_others():
    """After a failure the step runs again with what is left, untouched; positions tell whom a failure is of."""
    bench = Bench(*(sequence(name, 3) for name in "abc"))
    bench.scheduler.admit()
    plan = bench.plan()
    assert names(plan.owners([2, 3, 4])) == ["a", "b"]
    assert told(plan.without(plan.owners([5]))) == [("a", 3, True), ("c", 3, True)]


def test_logits_are_asked_for_where_they_are_used():
    """One row to sample from, none in the middle of a prompt, all of a prompt whose log probabilities are wanted."""
    whole, middle, asked = sequence("a", 3), sequence("b", 9), sequence("c", 3)
    asked.sampling = Sampling(max_tokens=4, prompt_logprobs=True)
    items = Scheduled.of(whole, 3), Scheduled.of(middle, 4), Scheduled.of(asked, 2)
    assert [(item.sequence.request_id, rows) for item, rows in StepPlan(items).rows()] == [
        ("a", range(0, 1)),
        ("c", range(1, 3)),
    ]


# Slots and fairness ----------------------------------------------------------------------------------------------


def test_slots_are_kept_to_and_given_on():
    """No more sequences run than there are slots; the next in line gets a freed one, in order of arrival."""
    bench = Bench(*(sequence(name, 3) for name in "abcd"), slots=2)
    assert bench.admitted() == ["a", "b"]
    assert bench.admitted() == []
    bench.scheduler.remove(bench.scheduler.running[0])
    assert bench.admitted() == ["c"]


def test_tenants_take_turns_within_a_priority():
    """However many one tenant sends, another's next request waits for one turn; lower priorities wait for all."""
    bench = Bench(
        *(sequence(f"a{i}", tenant="a") for i in range(4)),
        *(sequence(f"b{i}", tenant="b") for i in range(2)),
        sequence("urgent", tenant="a", priority=-1),
        sequence("idle", tenant="c", priority=1),
        slots=1,
    )
    order = []
    while bench.scheduler.waiting:
        order += bench.admitted()
        bench.scheduler.remove(bench.scheduler.running[0])
    assert order == ["urgent", "a0", "b0", "a1", "b1", "a2", "a3", "idle"]


@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "back", "pop", "remove"]), st.integers(0, 2), st.sampled_from("xyz")),
        max_size=40,
    )
)
@settings(deadline=None)
def test_the_queue_loses_nobody(actions: list[tuple[str, int, str]]):
    """Against a plain list: priorities first, a tenant's own order kept, those sent back before those who wait."""
    queue, twin = WaitingQueue(), []
    for number, (action, priority, tenant) in enumerate(actions):
        one = sequence(str(number), priority=priority, tenant=tenant)
        if action == "push":
            queue.push(one)
            twin.append(one)
        elif action == "back":
            queue.push_front(one)
            twin.insert(0, one)
            if priority == min(other.priority for other in twin):
                assert queue.first() is one
        elif twin and action == "pop":
            first = queue.first()
            assert queue.pop() is first
            assert first.priority == min(other.priority for other in twin)
            line = [other for other in twin if (other.priority, other.tenant) == (first.priority, first.tenant)]
            assert first is line[0]
            twin.remove(first)
        elif twin:
            gone = twin.pop(number % len(twin))
            assert queue.remove(gone)
            assert not queue.remove(gone)
        assert len(queue) == len(twin)
        assert set(queue) == set(twin)
    assert queue.first() is None or twin


def test_a_higher_priority_takes_a_slot_from_a_lower_one():
    """The newest of the lowest priority gives way, waits in front of its line, and goes on where it was."""
    bench = Bench(*(sequence(name, 3, priority=5) for name in "abc"), slots=2)
    bench.step()
    newest = bench.scheduler.running[1]
    bench.add(sequence("urgent", 3, priority=1), sequence("same", 3, priority=5))
    assert bench.admitted() == ["urgent"]
    assert bench.running == ["urgent", "a"]
    assert (newest.computed, len(newest.tokens), newest.table.held) == (0, 4, [])
    bench.scheduler.remove(bench.scheduler.running[0])
    assert bench.admitted() == ["b"], "before c, which came later"
    assert told(bench.plan()) == [("a", 1, True), ("b", 4, True)]


def test_who_cannot_have_its_place_takes_none_from_others():
    """Three slots are wanted and two could be had: nobody is sent back in vain."""
    wide = sequence("wide", 3)
    wide.siblings = (wide.sibling(1, wide.span), wide.sibling(2, wide.span))
    bench = Bench(sequence("low", 3, priority=9), sequence("equal", 3), slots=3)
    bench.step()
    bench.add(wide)
    assert bench.admitted() == []
    assert bench.running == ["equal", "low"]
    bench.scheduler.remove(bench.scheduler.running[0])
    assert bench.admitted() == ["wide"]
    assert bench.running == ["wide"]


# Blocks ----------------------------------------------------------------------------------------------------------


def test_admission_takes_prompts_that_fit_and_reserves_no_output():
    """What max_tokens may come to is nobody's yet; a margin of one block for each that runs keeps the peace."""
    bench = Bench(*(sequence(name, 8, max_tokens=1000) for name in "abcd"), blocks=8, budget=100)
    assert bench.admitted() == ["a", "b", "c"], "2 + 2 + 2 blocks; d's would leave them none to go on"
    assert bench.cache.free_blocks == 8, "nothing is taken before it is needed"
    bench.step()
    assert bench.cache.free_blocks == 2


def test_the_newest_gives_its_blocks_to_who_came_before():
    """Out of blocks, the last in rank waits again with its tokens; the first goes on without a pause."""
    bench = Bench(sequence("a", 7, max_tokens=16), sequence("b", 7, max_tokens=16), blocks=6, budget=100)
    bench.step()
    first, second = bench.scheduler.running
    while bench.running == ["a", "b"]:
        before = len(first.tokens), len(second.tokens)
        bench.step()
        assert len(first.tokens) == before[0] + 1
    assert bench.running == ["a"]
    assert second.computed == 0
    assert len(second.tokens) == before[1], "kept"
    for _ in range(100):
        bench.step()
    assert (first.generated, second.generated) == (16, 16)


def test_who_gets_no_block_keeps_its_own_while_nobody_needs_them():
    """The last in rank waits in its place: blocks come free when another ends, and nothing is computed twice."""
    bench = Bench(sequence("a", 8, max_tokens=4), sequence("b", 4, max_tokens=8), blocks=4)
    assert told(bench.step()) == [("a", 8, True), ("b", 2, False)]
    assert told(bench.step()) == [("a", 1, True), ("b", 2, True)], "a has three blocks now, and b one"
    for _ in range(2):
        assert told(bench.step()) == [("a", 1, True)]
        assert bench.scheduler.running[-1].computed == 4
    assert told(bench.step()) == [("b", 1, True)]


def test_removing_frees_what_was_held_wherever_it_was():
    """A waiting sequence can be removed too, and one that has gone may be removed again."""
    bench = Bench(sequence("a", 6), sequence("b", 6), slots=1, blocks=3)
    (running,) = bench.scheduler.admit()
    bench.plan()
    waiting = bench.scheduler.waiting.first()
    for _ in range(2):
        bench.scheduler.remove(waiting)
        bench.scheduler.remove(running)
    assert bench.running == []
    assert not len(bench.scheduler.waiting)
    assert bench.plan().scheduled == ()
    assert bench.cache.free_blocks == 3


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2), st.sampled_from("xy"), st.integers(0, 9)),
        min_size=1,
        max_size=10,
    ),
    slots=st.integers(1, 8),
    budget=st.integers(8, 20),
    blocks=st.integers(11, 30),
)
@settings(max_examples=60, deadline=None)
def test_whatever_fits_alone_is_done(
    requests: list[tuple[int, int, int, str, int]], slots: int, budget: int, blocks: int
):
    """Any mix in any pool that holds the largest: each gets all its tokens, within budget and slots, without a leak."""
    bench = Bench(slots=slots, budget=budget, blocks=blocks)
    coming = [
        (at, sequence(str(number), prompt, max_tokens=most, priority=priority, tenant=tenant))
        for number, (prompt, most, priority, tenant, at) in enumerate(requests)
    ]
    for now in range(2000):
        bench.add(*(one for at, one in coming if at == now))
        plan = bench.step()
        assert len(bench.running) <= slots
        assert sum(item.count for item in plan.scheduled) <= budget
        assert plan.scheduled or not (bench.running or len(bench.scheduler.waiting)), "work, and nothing done"
        if now > 9 and not plan.scheduled:
            break
    assert all(one.generated == one.sampling.max_tokens for _, one in coming)
    assert bench.cache.free_blocks == blocks


# The hint to who finds the queue full ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "now", "expected"),
    [
        ([], 5.0, 1.0),  # nothing is known yet
        ([5.0], 5.0, 1.0),
        ([0.0, 1.0, 2.0, 3.0], 4.0, 50.0),  # one a second, half of 100 wait before
        ([i / 100 for i in range(100)], 1.0, 0.5),  # a hundred a second
        ([i / 10_000 for i in range(64)], 0.0064, 0.05),  # never less than this
        ([0.0], 1000.0, 60.0),  # never more
    ],
)
def test_the_hint_follows_the_rate_of_late(times: list[float], now: float, expected: float):
    """Come back when half of those who wait have begun."""
    rate = AdmissionRate()
    for time in times:
        rate.note(time)
    assert rate.retry_after(100, now) == pytest.approx(expected, rel=0.05)
