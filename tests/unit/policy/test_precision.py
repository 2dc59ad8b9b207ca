"""Bits per expert: within the budget, at the least error, on the hull that theory promises."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moiety.errors import ConfigError
from moiety.policy.precision import Option, Precision, allocate

BITS = (Precision(16), Precision(8), Precision(4, 32), Precision(4, 128))


def options(sizes: tuple[int, ...], errors: tuple[float, ...]) -> tuple[Option, ...]:
    """One expert's options, from the largest to the smallest."""
    return tuple(Option(*three) for three in zip(BITS, sizes, errors, strict=False))


EXPERT = st.tuples(
    st.lists(st.integers(1, 40), min_size=3, max_size=3, unique=True).map(lambda sizes: tuple(sorted(sizes)[::-1])),
    st.lists(st.floats(0, 100), min_size=3, max_size=3).map(lambda errors: tuple(sorted(errors))),
).map(lambda pair: options(*pair))


@settings(deadline=None, max_examples=200)
@given(experts=st.lists(EXPERT, min_size=1, max_size=5), spare=st.integers(0, 150))
def test_the_budget_holds_and_the_error_is_least_but_for_one_step(experts: list[tuple[Option, ...]], spare: int):
    """Never above the budget; never worse than the best of all by more than what one expert's one step costs."""
    least = sum(of[-1].nbytes for of in experts)
    budget = least + spare
    allocation = allocate(dict(enumerate(experts)), budget)
    assert allocation.nbytes <= budget
    best = min(
        sum(option.error for option in chosen)
        for chosen in product(*experts)
        if sum(option.nbytes for option in chosen) <= budget
    )
    dearest = max(of[-1].error - of[0].error for of in experts)
    assert best - 1e-9 <= allocation.error <= best + dearest + 1e-9


@settings(deadline=None, max_examples=200)
@given(experts=st.lists(EXPERT, min_size=1, max_size=5), spare=st.integers(0, 150))
def test_no_other_allocation_of_as_few_bytes_is_better_along_the_hull(experts: list[tuple[Option, ...]], spare: int):
    """More memory never costs error, and enough of it costs none."""
    least = sum(of[-1].nbytes for of in experts)
    tight, loose = (allocate(dict(enumerate(experts)), least + extra) for extra in (spare, 10_000))
    assert loose.error == pytest.approx(sum(min(option.error for option in of) for of in experts))
    assert loose.error <= tight.error + 1e-9


def test_sensitive_experts_keep_their_bits():
    """Where half of the experts must go down, those go whose outputs suffer least."""
    sizes = (16, 8, 4)
    experts = {expert: options(sizes, (0.0, 0.1 * expert, float(expert))) for expert in range(4)}
    chosen = allocate(experts, 48).chosen

    assert chosen[3].precision.bits == 16


def test_a_budget_below_the_floor_names_it():
    """Where even the fewest bits do not fit, the error says how many bytes would."""
    with pytest.raises(ConfigError, match="at least 8 bytes"):
        allocate({0: options((16, 8, 4), (0, 1, 2)), 1: options((16, 8, 4), (0, 1, 2))}, 7)


def test_bytes_are_those_of_all_that_is_stored():
    """What a precision promises is what its matrices take: codes, scales, shape."""
    assert Precision(16).bytes_of((128, 256), 2) == 128 * 256 * 2
    assert Precision(8).bytes_of((128, 256), 2) == 128 * 256 + 128 * 4 + 16
    assert Precision(4, 32).bytes_of((128, 256), 2) == 128 * 128 + 128 * 8 * 2 + 16
