"""The gateway's places: a tenant that is alone may have all, and tenants that compete get equal shares."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from moiety.errors import ResourceExhausted
from moiety.gateway.admission import MOST_CLAIMS, Admission, host_of


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


def take(admission: Admission, tenant: str, places: int, host: str = "") -> list[ExitStack]:
    """Takes `places` places; closing one frees it."""
    taken = []
    for _ in range(places):
        stack = ExitStack()
        stack.enter_context(admission.place(tenant, host))
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


def taken_or_refused(admission: Admission, tenant: str, host: str) -> list[ExitStack]:
    """Takes a place if the admission gives one."""
    try:
        return take(admission, tenant, 1, host)
    except ResourceExhausted:
        return []


def test_invented_tenants_take_nothing_from_another_host(clock: Clock):
    """Against a thousand invented names at another host, a tenant keeps an equal share: half of the places."""
    admission = Admission(16, lambda: 2.0, clock)
    honest = take(admission, "honest", 8, "a")
    invented = [place for n in range(8) for place in take(admission, f"name {n}", 1, "b")]
    for number in range(1000):
        assert not taken_or_refused(admission, f"name {number}", "b")
    for round_number in range(200):  # requests end and others take their places; the attacker is always first
        clock.now += 0.1
        (honest if round_number % 2 else invented).pop(0).close()
        for number in range(20):
            invented += taken_or_refused(admission, f"name {20 * round_number + number}", "b")
        while len(honest) < 8 and (got := taken_or_refused(admission, "honest", "a")):
            honest += got
        assert len(honest) >= 7
    assert len(invented) <= 9


def test_names_that_only_ask_count_as_one(clock: Clock):
    """At one host, a thousand names without a place lower the share of a tenant with requests to half, not to nothing."""
    admission = Admission(16, lambda: 2.0, clock)
    taken = take(admission, "honest", 16, "a")
    for number in range(1000):
        assert not taken_or_refused(admission, f"name {number}", "a")
    for place in taken[7:]:
        place.close()
    taken[7:] = take(admission, "honest", 1, "a")
    with pytest.raises(ResourceExhausted, match="8 of this tenant's requests are in flight, its share"):
        take(admission, "honest", 1, "a")


def test_a_host_with_many_claims_keeps_no_other_from_claiming(clock: Clock):
    """The claims of one host are bounded, and another host's claim counts beside them."""
    admission = Admission(4, lambda: 2.0, clock)
    taken = take(admission, "x", 4, "a")
    for number in range(10 * MOST_CLAIMS):
        assert not taken_or_refused(admission, f"name {number}", "a")
    assert not taken_or_refused(admission, "late", "b")
    taken.pop().close()
    with pytest.raises(ResourceExhausted, match="3 of this host's requests are in flight, its share"):
        take(admission, "y", 1, "a")
    take(admission, "late", 1, "b")


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:192.0.2.7:50000", "192.0.2.7"),
        ("ipv6:%5B::1%5D:50000", "::/64"),
        ("ipv6:[2001:db8:0:7:1:2:3:4]:1", "2001:db8:0:7::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50000", "fe80::/64"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
        ("", ""),
    ],
)
def test_a_host_is_an_address_or_a_network(peer: str, host: str):
    """Connections of one IPv4 address, or of one IPv6 network, are of one host."""
    assert host_of(peer) == host
