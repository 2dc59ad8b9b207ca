"""The gateway's places: a tenant that is alone may have all, and tenants that compete get equal shares."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from moiety.errors import ResourceExhausted
from moiety.gateway.admission import Admission


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock at 0."""
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    """Four places, and a retry delay of two seconds."""
    return Admission(4, lambda: 2.0, clock)


def take(admission: Admission, tenant: str, places: int) -> list[ExitStack]:
    """Takes `places` places; closing one frees it."""
    taken = []
    for _ in range(places):
        stack = ExitStack()
        stack.enter_context(admission.place(tenant))
        taken.append(stack)
    return taken


def test_one_tenant_may_have_everything(admission: Admission):
    """One tenant gets all places, then a refusal with the retry delay; a freed place can be taken at once."""
    taken = take(admission, "a", 4)
    with pytest.raises(ResourceExhausted, match="4 requests are in flight") as refused:
        take(admission, "a", 1)
    assert refused.value.retry_after_s == 2.0
    taken.pop().close()
    take(admission, "a", 1)


def test_a_refused_tenant_gets_the_next_places(admission: Admission):
    """A refused tenant's claim keeps freed places from tenants with a full share, until it has its own share."""
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
    taken += take(admission, "a", 1)  # one of its two: below its share, so other claims do not matter


def test_an_unused_claim_ends(admission: Admission, clock: Clock):
    """After twice the retry delay a claim has ended, and any tenant can take the place."""
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
    """A thousand tenants whose requests have ended do not count: two tenants that compete get half of the places each."""
    for number in range(1000):
        for place in take(admission, f"tenant {number}", 4):
            place.close()
    taken = take(admission, "a", 4)
    with pytest.raises(ResourceExhausted):
        take(admission, "b", 1)  # from now on b has a claim
    for _ in range(3):
        taken.pop().close()
    taken += take(admission, "a", 1)
    with pytest.raises(ResourceExhausted, match="2 of this tenant's requests are in flight, its share"):
        take(admission, "a", 1)
