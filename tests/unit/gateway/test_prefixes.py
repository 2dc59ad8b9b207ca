"""What a gateway believes to be cached where: bounded, corrected by what routers tell, apart for each tenant."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.gateway.prefixes import PrefixHasher, PrefixIndex

P = 4  # tokens per block
HASHER = PrefixHasher(seed=1)
prompts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def hashes(ids: list[int], tenant: str = "") -> list[int]:
    """Of a prompt's blocks."""
    return HASHER.hashes(np.array(ids, dtype=np.uint32), P, tenant)


@given(first=prompts, second=prompts)
def test_equal_hashes_mean_equal_prefixes(first: list[int], second: list[int]):
    """Block i's hash covers every token up to its end, and no later one; the last token is never in a block."""
    ones, others = hashes(first), hashes(second)
    assert len(ones) == (len(first) - 1) // P
    for i, (one, other) in enumerate(zip(ones, others, strict=False), 1):
        assert (one == other) == (first[: i * P] == second[: i * P])
    assert len({*ones, *others}) == len(
        {tuple(ids[: i * P]) for ids in (first, second) for i in range(1, 1 + (len(ids) - 1) // P)}
    )


def test_tenants_and_gateways_have_hashes_of_their_own():
    """The same prompt of another tenant is another prompt, and seeds decide everything."""
    ids = list(range(20))
    assert not set(hashes(ids, "a")) & set(hashes(ids, "b"))
    other = PrefixHasher(seed=2).hashes(np.array(ids, dtype=np.uint32), P, "a")
    assert not set(hashes(ids, "a")) & set(other)
    assert PrefixHasher(seed=1).hashes(np.array(ids, dtype=np.uint32), P, "a") == hashes(ids, "a")


def test_keys_grow_with_the_longest_prompt():
    """A prompt of any length is hashed, the same before and after a longer one came."""
    hasher = PrefixHasher(seed=3)
    ids = np.arange(70_000, dtype=np.uint32)
    short = hasher.hashes(ids[:100], P, "")
    assert hasher.hashes(ids, P, "")[: len(short)] == short


@settings(max_examples=50)
@given(sent=st.lists(prompts, max_size=20), asked=prompts, room=st.integers(1, 30))
def test_a_match_is_a_prefix_that_was_sent(sent: list[list[int]], asked: list[int], room: int):
    """Never more blocks than fit, never a prefix that was not sent, and the last prompt sent is known as far as fits."""
    index = PrefixIndex(room)
    for ids in sent:
        index.visit(hashes(ids))
        assert len(index) <= room
        assert index.match(hashes(ids)) == min(len(hashes(ids)), room)
    matched = index.match(hashes(asked)) * P
    assert not matched or any(ids[:matched] == asked[:matched] for ids in sent)


def test_what_a_router_lacks_is_forgotten_with_all_that_is_older():
    """A router that had evicted a prompt has evicted what was used before it, and still has what was used after."""
    index = PrefixIndex(100)
    old, known, recent = (hashes([n] * 17) for n in (1, 2, 3))
    for prompt in (old, known, recent):
        index.visit(prompt).computed = True
    again = index.visit(known)
    assert (again.matched, again.expected) == (4, 4)
    index.answered(again, found=1)
    assert [index.match(prompt) for prompt in (old, known, recent)] == [0, 4, 4]


def test_a_prompt_still_being_computed_is_no_promise():
    """Sent again before its first answer, nothing is expected, so nothing is forgotten when it is not found."""
    index = PrefixIndex(100)
    other, prompt = hashes([1] * 17), hashes([2] * 17)
    index.visit(other).computed = True
    index.visit(prompt)
    again = index.visit(prompt)
    assert (again.matched, again.expected) == (4, 0)
    index.answered(again, found=0)
    assert index.match(other) == 4


def test_a_prompt_that_was_refused_is_withdrawn():
    """What only the refused request brought is forgotten; what was known before it, or came behind it, is not."""
    index = PrefixIndex(100)
    index.visit(hashes([1] * 9)).computed = True
    longer = hashes([1] * 25)
    index.withdraw(index.visit(longer), longer)
    assert index.match(longer) == 2
    first = index.visit(longer)
    index.visit(longer)
    index.withdraw(first, longer)
    assert index.match(longer) == len(longer)
