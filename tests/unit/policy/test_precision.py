"""Bits per expert: within the budget, with the least error, along the convex hull."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.errors import ConfigError
from moiety.policy.precision import Option, Precision, allocate

BITS = (Precision(16), Precision(8), Precision(4, 32), Precision(4, 128))


def options(sizes: tuple[int, ...], errors: tuple[float, ...]) -> tuple[Option, ...]:
    """Returns one expert's options, from the largest to the smallest."""
    return tuple(Option(*values) for values in zip(BITS, sizes, errors, strict=False))


EXPERT = st.tuples(
    st.lists(st.integers(1, 40), min_size=3, max_size=3, unique=True).map(lambda sizes: tuple(sorted(sizes)[::-1])),
    st.lists(st.floats(0, 100), min_size=3, max_size=3).map(lambda errors: tuple(sorted(errors))),
).map(lambda pair: options(*pair))


@settings(deadline=None, max_examples=200)
@given(experts=st.lists(EXPERT, min_size=1, max_size=5), spare=st.integers(0, 150))
def test_the_budget_holds_and_the_error_is_least_up_to_one_step(experts: list[tuple[Option, ...]], spare: int):
    """The bytes are within the budget; the error exceeds the optimum by at most one expert's largest error range."""
    least = sum(choices[-1].nbytes for choices in experts)
    budget = least + spare
    allocation = allocate(dict(enumerate(experts)), budget)
    assert allocation.nbytes <= budget
    best = min(
        sum(option.error for option in chosen)
        for chosen in product(*experts)
        if sum(option.nbytes for option in chosen) <= budget
    )
    largest_step = max(choices[-1].error - choices[0].error for choices in experts)
    assert best - 1e-9 <= allocation.error <= best + largest_step + 1e-9


@settings(deadline=None, max_examples=200)
@given(experts=st.lists(EXPERT, min_size=1, max_size=5), spare=st.integers(0, 150))
def test_more_memory_never_adds_error(experts: list[tuple[Option, ...]], spare: int):
    """More memory never adds error, and with enough memory every expert has its least error."""
    least = sum(choices[-1].nbytes for choices in experts)
    tight, loose = (allocate(dict(enumerate(experts)), least + extra) for extra in (spare, 10_000))
    assert loose.error == pytest.approx(sum(min(option.error for option in choices) for choices in experts))
    assert loose.error <= tight.error + 1e-9


def test_sensitive_experts_keep_their_bits():
    """If some experts must lose bits, those with the least additional error lose them."""
    sizes = (16, 8, 4)
    experts = {expert: options(sizes, (0.0, 0.1 * expert, float(expert))) for expert in range(4)}
    chosen = allocate(experts, 48).chosen

    assert chosen[3].precision.bits == 16


def test_a_budget_below_the_floor_names_the_floor():
    """If even the fewest bits do not fit, the error names the bytes that would."""
    with pytest.raises(ConfigError, match="at least 8 bytes"):
        allocate({0: options((16, 8, 4), (0, 1, 2)), 1: options((16, 8, 4), (0, 1, 2))}, 7)


def test_bytes_count_everything_stored():
    """The bytes of a precision are those of its codes, scales and shape."""
    assert Precision(16).bytes_of((128, 256), 2) == 128 * 256 * 2
    assert Precision(8).bytes_of((128, 256), 2) == 128 * 256 + 128 * 4 + 16
    assert Precision(4, 32).bytes_of((128, 256), 2) == 128 * 128 + 128 * 8 * 2 + 16
