"""The gateway's places: all for one tenant where it is alone, an equal share for each where they are short."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from moiety.errors import ResourceExhausted
from moiety.gateway.admission import Admission


class Clock:
    """Time as the test tells it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """At 0."""
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    """Four places; who is refused is told to come again in two seconds."""
    return Admission(4, lambda: 2.0, clock)


def take(admission: Admission, tenant: str, places: int) -> list[ExitStack]:
    """That many places, each to be given back by closing it."""
    taken = []
    for _ in range(places):
        stack = ExitStack()
        stack.enter_context(admission.place(tenant))
        taken.append(stack)
    return taken


def test_one_tenant_may_have_everything(admission: Admission):
    """Up to the bound, then a refusal with the hint; a place that is given back can be taken at once."""
    taken = take(admission, "a", 4)
    with pytest.raises(ResourceExhausted, match="4 requests are in flight") as refused:
        take(admission, "a", 1)
    assert refused.value.retry_after_s == 2.0
    taken.pop().close()
    take(admission, "a", 1)


def test_who_is_refused_gets_the_next_places(admission: Admission):
    """A latecomer's claim keeps places that become free from those with a full share, until it has had its own."""
    taken, late = take(admission, "a", 4), list[ExitStack]()
    with pytest.raises(ResourceExhausted):
        take(admission, "b", 1)
    taken.pop().close()
    with pytest.raises(ResourceExhausted, match="3 of this tenant's requests are in flight, its share"):
        take(admission, "a", 1)
    late += take(admission, "b", 1)
    with pytest.raises(ResourceExhausted):
        take(admission, "b", 1)
    taken.pop().close()
    with pytest.raises(ResourceExhausted, match="its share while others wait"):
        take(admission, "a", 1)
    late += take(admission, "b", 1)
    with pytest.raises(ResourceExhausted, match="4 requests are in flight"):
        take(admission, "b", 1)
    taken.pop().close()
    taken += take(admission, "a", 1)  # one of its two: below its share, whoever waits


def test_a_claim_that_nobody_comes_for_ends(admission: Admission, clock: Clock):
    """Twice the hint later the places are anybody's again."""
    taken = take(admission, "a", 4)
    with pytest.raises(ResourceExhausted):
        take(admission, "b", 1)
    taken.pop().close()
    clock.now = 3.9
    with pytest.raises(ResourceExhausted):
        take(admission, "a", 1)
    clock.now = 4.1
    take(admission, "a", 1)


def test_tenants_are_forgotten_with_their_requests(admission: Admission):
    """Any number of tenants may come and go; each then finds a free gateway."""
    for number in range(1000):
        for place in take(admission, f"tenant {number}", 4):
            place.close()
