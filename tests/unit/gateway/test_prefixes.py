"""A gateway's estimate of what routers have cached: bounded, corrected by their answers, separate for each tenant."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.gateway.routers.prefixes import PrefixHasher, PrefixIndex

P = 4  # tokens per block
HASHER = PrefixHasher(seed=1)
prompts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def hashes(ids: list[int], tenant: str = "") -> list[int]:
    """Returns the hashes of a prompt's blocks."""
    return HASHER.hashes(np.array(ids, dtype=np.uint32), P, tenant)


@given(first=prompts, second=prompts)
def test_equal_hashes_mean_equal_prefixes(first: list[int], second: list[int]):
    """Two blocks have equal hashes exactly where all tokens up to their end are equal; the last token is in no block."""
    ones, others = hashes(first), hashes(second)
    assert len(ones) == (len(first) - 1) // P
    for i, (one, other) in enumerate(zip(ones, others, strict=False), 1):
        assert (one == other) == (first[: i * P] == second[: i * P])
    assert len({*ones, *others}) == len(
        {tuple(ids[: i * P]) for ids in (first, second) for i in range(1, 1 + (len(ids) - 1) // P)}
    )


def test_tenants_and_gateways_have_hashes_of_their_own():
    """Another tenant or another seed gives other hashes for the same prompt; the same seed gives the same."""
    ids = list(range(20))
    assert not set(hashes(ids, "a")) & set(hashes(ids, "b"))
    other = PrefixHasher(seed=2).hashes(np.array(ids, dtype=np.uint32), P, "a")
    assert not set(hashes(ids, "a")) & set(other)
    assert PrefixHasher(seed=1).hashes(np.array(ids, dtype=np.uint32), P, "a") == hashes(ids, "a")


def test_keys_grow_with_the_longest_prompt():
    """A prompt has the same hashes before and after a longer prompt was hashed."""
    hasher = PrefixHasher(seed=3)
    ids = np.arange(70_000, dtype=np.uint32)
    short = hasher.hashes(ids[:100], P, "")
    assert hasher.hashes(ids, P, "")[: len(short)] == short


@settings(max_examples=50)
@given(sent=st.lists(prompts, max_size=20), asked=prompts, room=st.integers(1, 30))
def test_a_match_is_a_prefix_that_was_sent(sent: list[list[int]], asked: list[int], room: int):
    """The index has at most `room` blocks, matches only prefixes that were sent, and knows the latest prompt."""
    index = PrefixIndex(room)
    for ids in sent:
        index.visit(hashes(ids))
        assert len(index) <= room
        assert index.match(hashes(ids)) == min(len(hashes(ids)), room)
    matched = index.match(hashes(asked)) * P
    assert not matched or any(ids[:matched] == asked[:matched] for ids in sent)


def test_a_missing_prompt_is_forgotten_with_all_older_ones():
    """When a router has evicted a prompt, prompts used before it are forgotten, and prompts used after it are kept."""
    index = PrefixIndex(100)
    old, known, recent = (hashes([n] * 17) for n in (1, 2, 3))
    for prompt in (old, known, recent):
        index.visit(prompt).computed = True
    again = index.visit(known)
    assert (again.matched, again.expected) == (4, 4)
    index.answered(again, found=1)
    assert [index.match(prompt) for prompt in (old, known, recent)] == [0, 4, 4]


def test_a_prompt_still_being_computed_is_not_expected():
    """A prompt sent again before its first answer is not expected to be cached, so a miss forgets no other prompt."""
    index = PrefixIndex(100)
    other, prompt = hashes([1] * 17), hashes([2] * 17)
    index.visit(other).computed = True
    index.visit(prompt)
    again = index.visit(prompt)
    assert (again.matched, again.expected) == (4, 0)
    index.answered(again, found=0)
    assert index.match(other) == 4


def test_a_prompt_that_was_refused_is_withdrawn():
    """Blocks that only the refused request added are forgotten; blocks known before it or added later are kept."""
    index = PrefixIndex(100)
    index.visit(hashes([1] * 9)).computed = True
    longer = hashes([1] * 25)
    index.withdraw(index.visit(longer), longer)
    assert index.match(longer) == 2
    first = index.visit(longer)
    index.visit(longer)
    index.withdraw(first, longer)
    assert index.match(longer) == len(longer)
