"""Prompt lookup drafts tokens from earlier text, and accepting drafts changes no token."""

from __future__ import annotations

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from moiety.router.sequence.drafts import LONGEST, SHORTEST, Drafter, accepted


def drafted_by(drafter: Drafter, tokens: list[int], most: int) -> tuple[int, ...]:
    """Indexes all tokens and drafts."""
    drafter.index(tokens, len(tokens))
    return drafter.draft(tokens, most)


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def naive(tokens: list[int], most: int) -> tuple[int, ...]:
    """Searches every earlier position, longest match first and the latest among equals; copies token by token."""
    for width in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, width - 1, -1):
            if len(tokens) >= width and tokens[end - width : end] == tokens[-width:]:
                text = list(tokens)
                for i in range(most):
                    text.append(text[end + i])
                return tuple(text[len(tokens) :])
    return ()


def decoded(next_token: dict[tuple[int, ...], int], prompt: list[int], count: int, most: int) -> tuple[list[int], int]:
    """Decodes `count` tokens from a table of two-token contexts, with `most` drafts a step; returns text and steps."""
    drafter, tokens, steps = Drafter(most) if most else None, list(prompt), 0
    while len(tokens) < len(prompt) + count:
        left = len(prompt) + count - len(tokens)
        drafts = drafted_by(drafter, tokens, left - 1) if drafter else ()
        text = [*tokens, *drafts]
        sampled = [next_token.get(tuple(text[: len(tokens) + i][-2:]), 0) for i in range(len(drafts) + 1)]
        right = accepted(drafts, sampled)
        tokens += sampled[: right + 1]
        if drafter:
            drafter.learn(len(drafts), right, len(tokens))
        steps += 1
    return tokens, steps


@given(TEXTS, st.integers(1, 2))
def test_drafts_are_those_of_the_naive_search(text: list[int], most: int):
    """The incremental index finds what a search through the whole text finds, after every token."""
    drafter = Drafter(most)
    for end in range(1, len(text) + 1):
        assert drafted_by(drafter, text[:end], most) == naive(text[:end], most)


@given(TEXTS, st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.integers(0, 3)), st.integers(1, 8))
def test_tokens_are_those_of_decoding_one_by_one(prompt: list[int], table: dict[tuple[int, ...], int], most: int):
    """Drafts change no token of any model, and take no more steps."""
    plain, plain_steps = decoded(table, prompt, 40, 0)
    drafted, steps = decoded(table, prompt, 40, most)
    assert drafted == plain
    assert steps <= plain_steps


def test_repetition_takes_few_steps():
    """A text of period three is decoded at up to nine tokens a step."""
    table = {(0, 1): 2, (1, 2): 0, (2, 0): 1}
    tokens, steps = decoded(table, [0, 1, 2, 0, 1, 2], 90, 8)
    assert tokens == [0, 1, 2] * 32
    assert steps <= 90 / 9 + 3


def test_poor_drafts_become_rare():
    """If no draft is right, the number of wasted drafts grows only with the logarithm of the text's length."""
    drafter, generator, tokens = Drafter(8), random.Random(0), [0] * 8
    wasted = 0
    for _ in range(2000):
        drafts = drafted_by(drafter, tokens, 8)
        tokens.append(generator.choice([t for t in range(4) if not drafts or t != drafts[0]]))
        drafter.learn(len(drafts), 0, len(tokens))
        wasted += len(drafts)
    assert 0 < wasted <= 12


@given(TEXTS, st.lists(st.integers(1, 9), min_size=60, max_size=60))
def test_an_index_built_in_parts_is_the_whole_index(text: list[int], parts: list[int]):
    """Nothing is drafted until every token is indexed, and then the same as if they had been indexed at once."""
    drafter, left = Drafter(2), len(text)
    for part in parts:
        if left:
            assert drafter.draft(text, 2) == ()
        done = drafter.index(text, part)
        assert done == min(part, left)
        left -= done
    assert drafter.draft(text, 2) == naive(text, 2)


def test_drafting_time_depends_on_new_tokens_only():
    """Drafting after one more token takes less than 1 % of the time of indexing the first 50,000."""
    generator = random.Random(0)
    tokens = [generator.randrange(1000) for _ in range(50_000)]
    drafter = Drafter(4)
    began = time.perf_counter()
    drafted_by(drafter, tokens, 4)
    first = time.perf_counter() - began
    later = []
    for _ in range(20):
        tokens.append(generator.randrange(1000))
        began = time.perf_counter()
        drafted_by(drafter, tokens, 4)
        later.append(time.perf_counter() - began)
    assert min(later) < first / 100


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), min_size=1, max_size=9))
def test_accepted_is_the_common_prefix(drafts: list[int], sampled: list[int]):
    """Drafts are accepted up to the first that differs from the token sampled at its position."""
    right = accepted(drafts, sampled)
    assert drafts[:right] == sampled[:right]
    assert right == min(len(drafts), len(sampled)) or drafts[right] != sampled[right]
