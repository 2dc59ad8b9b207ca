"""The scheduler keeps to slots, blocks and token budget, and every sequence gets its turn."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_support import Bench, names, sequence, summary

from moiety.core.expert_backend import CallClass
from moiety.core.sampling import Sampling
from moiety.router.schedule.scheduler import PROMPT_LOGITS
from moiety.router.sequence.step_plan import Scheduled, StepPlan

# A step ----------------------------------------------------------------------------------------------------------


def test_decode_goes_first_and_prompts_get_what_is_left():
    """Every running stream gets its token; prompts are cut to the budget, oldest first, and sample once complete."""
    bench = Bench(sequence("decoding", 2), sequence("long", 20), sequence("short", 3), sequence("more", 3))
    assert summary(bench.step()) == [("decoding", 2, True), ("long", 8, False)]
    plan = bench.step()
    assert plan.call_class is CallClass.PREFILL
    assert summary(plan) == [("decoding", 1, True), ("long", 9, False)]
    assert summary(bench.plan()) == [("decoding", 1, True), ("long", 3, True), ("short", 3, True), ("more", 3, True)]


def test_a_step_of_single_tokens_is_decode():
    """A step's calls are of class decode only if all its sequences are decoding."""
    bench = Bench(sequence("a", 5), sequence("b", 5))
    assert bench.step().call_class is CallClass.PREFILL
    assert bench.step().call_class is CallClass.DECODE


def test_a_plan_without_some_is_the_same_for_the_others():
    """Failed positions identify sequences, and the plan without them leaves the others unchanged."""
    bench = Bench(*(sequence(name, 3) for name in "abc"))
    bench.admitted()
    plan = bench.plan()
    assert names(plan.owners([2, 3, 4])) == ["a", "b"]
    assert summary(plan.without(plan.owners([5]))) == [("a", 3, True), ("c", 3, True)]


def test_logits_are_requested_only_where_used():
    """A plan has one row to sample from, none inside a prompt, and all rows for prompt log probabilities."""
    whole, middle, scored = sequence("a", 3), sequence("b", 9), sequence("c", 3)
    scored.sampling = Sampling(max_tokens=4, prompt_logprobs=True)
    items = Scheduled.of(whole, 3), Scheduled.of(middle, 4), Scheduled.of(scored, 2)
    assert [(item.sequence.request_id, rows) for item, rows in StepPlan(items).rows()] == [
        ("a", range(0, 1)),
        ("c", range(1, 3)),
    ]


def test_logits_of_prompts_are_computed_in_bounded_pieces():
    """However long the prompts whose log probabilities are requested, a step computes at most PROMPT_LOGITS rows for them."""
    scored = Sampling(max_tokens=2, prompt_logprobs=True)
    long = [sequence(name, 1000) for name in "abc"]
    for one in long:
        one.sampling = scored
    bench = Bench(*long, sequence("other", 300), budget=1000, blocks=1000)
    plan = bench.step()
    assert sum(item.wanted for item in plan.scheduled) <= PROMPT_LOGITS + len(long)
    assert summary(plan)[-1] == ("other", 300, True), "a prompt without log probabilities uses the rest of the budget"
    for _ in range(2 + len(long) * 1000 // PROMPT_LOGITS):
        assert sum(item.wanted for item in bench.step().scheduled) <= PROMPT_LOGITS + len(long)
    assert all(one.generated for one in long)


# Slots and fairness ----------------------------------------------------------------------------------------------


def test_freed_slots_go_to_the_next_arrival():
    """No more sequences run than there are slots; a freed slot goes to the next in order of arrival."""
    bench = Bench(*(sequence(name, 3) for name in "abcd"), slots=2)
    assert bench.admitted() == ["a", "b"]
    assert bench.admitted() == []
    bench.scheduler.remove(bench.scheduler.running[0])
    assert bench.admitted() == ["c"]


def test_invented_tenants_take_no_turns_from_another_host():
    """Hosts take turns before tenants do: a host with many names gets every second turn beside a host with one."""
    bench = Bench(
        *(sequence(f"a{i}", tenant=f"name {i}", host="a") for i in range(6)),
        *(sequence(f"b{i}", tenant="b", host="b") for i in range(3)),
    )
    assert bench.admitted() == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "a4"]


def test_tenants_take_turns_within_a_priority():
    """Tenants take turns, however many requests one sends; lower priorities wait for higher ones."""
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


def test_a_higher_priority_takes_a_slot_from_a_lower_one():
    """The newest of the lowest priority is preempted, waits in front of its queue, and continues with its tokens."""
    bench = Bench(*(sequence(name, 3, priority=5) for name in "abc"), slots=2)
    bench.step()
    newest = bench.scheduler.running[1]
    bench.add(sequence("urgent", 3, priority=1), sequence("same", 3, priority=5))
    assert bench.admitted() == ["urgent"]
    assert bench.running == ["urgent", "a"]
    assert (newest.computed, len(newest.tokens), newest.table.held) == (0, 4, [])
    bench.scheduler.remove(bench.scheduler.running[0])
    assert bench.admitted() == ["b"], "before c, which came later"
    assert summary(bench.plan()) == [("a", 1, True), ("b", 4, True)]


def test_nothing_is_preempted_for_a_request_that_still_would_not_fit():
    """A request that needs three slots when two can be freed preempts no sequence."""
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
    """Admission counts prompt blocks and one spare block for each running sequence, and nothing for max_tokens."""
    bench = Bench(*(sequence(name, 8, max_tokens=1000) for name in "abcd"), blocks=8, budget=100)
    assert bench.admitted() == ["a", "b", "c"], "2 + 2 + 2 blocks; with d no spare blocks would be left"
    assert bench.cache.free_blocks == 8, "nothing is taken before it is needed"
    bench.step()
    assert bench.cache.free_blocks == 2


def test_the_newest_is_preempted_for_earlier_sequences():
    """Without free blocks the last in rank waits again and keeps its tokens; the first advances every step."""
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


def test_a_sequence_without_a_new_block_keeps_those_it_has():
    """The last in rank keeps its blocks until another sequence ends, and no token is computed twice."""
    bench = Bench(sequence("a", 8, max_tokens=4), sequence("b", 4, max_tokens=8), blocks=4)
    assert summary(bench.step()) == [("a", 8, True), ("b", 2, False)]
    assert summary(bench.step()) == [("a", 1, True), ("b", 2, True)], "now a has three blocks, and b one"
    for _ in range(2):
        assert summary(bench.step()) == [("a", 1, True)]
        assert bench.scheduler.running[-1].computed == 4
    assert summary(bench.step()) == [("b", 1, True)]


def test_removing_frees_all_blocks():
    """Running and waiting sequences can be removed, and removing twice has no effect."""
    bench = Bench(sequence("a", 6), sequence("b", 6), slots=1, blocks=3)
    running = bench.scheduler.admit_next()
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
def test_each_request_that_fits_alone_finishes(
    requests: list[tuple[int, int, int, str, int]], slots: int, budget: int, blocks: int
):
    """In a pool that holds the largest request, any mix finishes within budget and slots, without a leak."""
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
        assert plan.scheduled or not (bench.running or len(bench.scheduler.waiting)), "there is work, but no plan"
        if now > 9 and not plan.scheduled:
            break
    assert all(one.generated == one.sampling.max_tokens for _, one in coming)
    assert bench.cache.free_blocks == blocks
