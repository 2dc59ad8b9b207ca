"""What runs next: slots, cache and token budget are kept to, and running streams never wait for somebody's prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moiety.core import CallClass, Sampling
from moiety.router.kvcache import CacheSpec, KVCache, LayerSpec
from moiety.router.scheduler import Scheduler, StepPlan
from moiety.router.sequence import Sequence

SPEC = CacheSpec({0: LayerSpec(1, 2, 2, torch.float32)})  # 16 bytes a token


def cache_of(tokens: int) -> KVCache:
    """A cache with room for so many tokens."""
    return KVCache(SPEC, tokens * SPEC.bytes_per_token, torch.device("cpu"))


def sequence(name: str, prompt: int, *, computed: int = 0, max_tokens: int = 4) -> Sequence:
    """A request with `prompt` tokens, `computed` of which are in the cache."""
    return Sequence(
        request_id=name,
        tokens=[1] * prompt,
        prompt_tokens=prompt,
        sampling=Sampling(max_tokens=max_tokens),
        stop_ids=frozenset(),
        emit=lambda _: None,
        computed=computed,
    )


def scheduler_of(*sequences: Sequence, slots: int = 8, budget: int = 10, cache: int = 1000) -> Scheduler:
    """A scheduler to which these requests have come."""
    scheduler = Scheduler(cache_of(cache), slots, budget)
    scheduler.waiting.extend(sequences)
    return scheduler


def told(plan: StepPlan) -> list[tuple[str, int, bool]]:
    """(request, tokens, whether its next token is sampled)."""
    return [(item.sequence.request_id, item.count, item.samples) for item in plan.scheduled]


def test_decode_goes_first_and_prompts_get_what_is_left():
    """Every running stream gets its token; prompts are cut to the budget, oldest first, and sample when complete."""
    scheduler = scheduler_of(
        sequence("long", 20), sequence("decoding", 5, computed=4), sequence("short", 3), sequence("more", 3)
    )
    scheduler.admit()
    plan = scheduler.plan()
    assert told(plan) == [("decoding", 1, True), ("long", 9, False)]
    assert plan.call_class is CallClass.PREFILL
    scheduler.running[0].computed = 14
    assert told(scheduler.plan()) == [("decoding", 1, True), ("long", 6, True), ("short", 3, True)]


def test_a_step_of_single_tokens_is_decode():
    """The class of a step's calls is decode only when all its sequences are decoding."""
    scheduler = scheduler_of(sequence("a", 5, computed=4), sequence("b", 9, computed=8))
    scheduler.admit()
    assert scheduler.plan().call_class is CallClass.DECODE


def test_slots_are_kept_to_and_given_on():
    """No more sequences run than there are slots; the next in line gets a freed one, in order of arrival."""
    scheduler = scheduler_of(*(sequence(name, 3) for name in "abcd"), slots=2)
    assert [s.request_id for s in scheduler.admit()] == ["a", "b"]
    assert scheduler.admit() == []
    scheduler.remove(scheduler.running[0])
    assert [s.request_id for s in scheduler.admit()] == ["c"]


def test_a_sequence_is_admitted_only_with_room_for_all_its_tokens():
    """A running request never runs out of cache: prompt and max_tokens are reserved before it starts."""
    scheduler = scheduler_of(sequence("a", 6), sequence("b", 7), sequence("c", 1), cache=20)
    assert [s.request_id for s in scheduler.admit()] == ["a"], "b needs 11 of 10; c waits its turn behind b"
    scheduler.remove(scheduler.running[0])
    assert [s.request_id for s in scheduler.admit()] == ["b", "c"]


def test_removing_frees_what_was_held_wherever_it_was():
    """A waiting sequence can be removed too, and one that has gone may be removed again."""
    scheduler = scheduler_of(sequence("a", 6), sequence("b", 6), slots=1, cache=10)
    (running,) = scheduler.admit()
    waiting = scheduler.waiting[0]
    for _ in range(2):
        scheduler.remove(waiting)
        scheduler.remove(running)
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.plan().scheduled == ()


def test_a_plan_without_some_is_the_same_for_the_others():
    """After a failure the step runs again with what is left, untouched."""
    scheduler = scheduler_of(*(sequence(name, 3) for name in "abc"))
    scheduler.admit()
    plan = scheduler.plan()
    assert told(plan.without([scheduler.running[1]])) == [("a", 3, True), ("c", 3, True)]


@given(
    prompts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    slots=st.integers(1, 8),
    budget=st.integers(8, 20),
)
def test_everything_is_computed_once_within_the_budget(prompts: list[int], slots: int, budget: int):
    """Whatever comes, each prompt is prefilled token by token exactly once, and no step exceeds the budget."""
    scheduler = scheduler_of(
        *(sequence(str(i), n, max_tokens=3) for i, n in enumerate(prompts)), slots=slots, budget=budget, cache=100
    )
    finished = 0
    for _ in range(1000):
        scheduler.admit()
        plan = scheduler.plan()
        if not plan.scheduled:
            break
        assert len(scheduler.running) <= slots
        assert sum(item.count for item in plan.scheduled) <= budget
        sampled = [item.sequence for item in plan.scheduled if item.samples]
        for item in plan.scheduled:
            item.sequence.computed += item.count
            assert item.sequence.computed <= len(item.sequence.tokens)
        for one in sampled:
            one.tokens.append(1)
            if one.generated == 3:
                scheduler.remove(one)
                finished += 1
    assert finished == len(prompts)


# The cache -----------------------------------------------------------------------------------------------------


def test_reserving_and_releasing_add_up():
    """What is reserved is not free, what is released is; nothing is given beyond the capacity."""
    cache = cache_of(10)
    assert (cache.capacity, cache.free) == (10, 10)
    assert cache.reserve("a", 6)
    assert not cache.reserve("b", 5)
    assert cache.free == 4, "a refused reservation takes nothing"
    assert cache.reserve("b", 4)
    assert cache.free == 0
    cache.release("a")
    cache.release("a")
    assert cache.free == 6


def test_capacity_is_memory_over_bytes_per_token():
    """K and V of all layers count, at their own widths and types."""
    spec = CacheSpec({0: LayerSpec(2, 8, 4, torch.float32), 3: LayerSpec(1, 16, 16, torch.bfloat16)})
    assert spec.bytes_per_token == 2 * (8 + 4) * 4 + 32 * 2
    assert KVCache(spec, 10 * spec.bytes_per_token + 1, torch.device("cpu")).capacity == 10


@pytest.mark.parametrize("chunks", [[7], [3, 4], [1] * 7])
def test_keys_and_values_come_back_in_order(chunks: list[int]):
    """However a prompt is cut, each layer sees all its tokens so far, in order; writing them again changes nothing."""
    spec = CacheSpec({0: LayerSpec(2, 3, 5, torch.float32), 1: LayerSpec(1, 4, 4, torch.float32)})
    cache = KVCache(spec, 100 * spec.bytes_per_token, torch.device("cpu"))
    cache.reserve("x", 7)
    cache.reserve("other", 7)
    for layer, entry in spec.layers.items():
        key = torch.randn(entry.heads, 7, entry.key_width)
        value = torch.randn(entry.heads, 7, entry.value_width)
        past = 0
        for count in chunks:
            for _ in range(2):  # a step that failed is run again
                new = slice(past, past + count)
                keys, values = cache.extend("x", layer, past, key[:, new], value[:, new])
                cache.extend("other", layer, past, torch.zeros_like(key[:, new]), torch.zeros_like(value[:, new]))
            past += count
            assert torch.equal(keys, key[:, :past])
            assert torch.equal(values, value[:, :past])
