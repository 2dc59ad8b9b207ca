"""Limits the requests that a gateway has in flight, and gives each host and each tenant a fair share of that limit.

No request waits here: routers queue requests, since they know their own capacity. A refused client retries later.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv6Network
from typing import NoReturn
from urllib.parse import unquote

from moiety.errors import ResourceExhausted

MOST_CLAIMS = 64  # of one host; a few are enough to keep others at their share


def host_of(peer: str) -> str:
    """Returns the host of a gRPC peer, such as ipv4:192.0.2.7:50000. All addresses of an IPv6 network (/64) are one host."""
    kind, _, address = unquote(peer).partition(":")
    host = address.rpartition(":")[0]
    if kind == "ipv6":
        with suppress(ValueError):
            return str(IPv6Network((host.strip("[]").partition("%")[0], 64), strict=False))
    return host or peer


class Admission:
    """Gives out the places of one gateway; each request in flight occupies one.

    Any tenant may take any free place. A tenant that has less than its share when it is refused gets a claim, which lasts
    twice the retry delay of the refusal. While others have claims, no one may exceed its share. So a tenant that comes late
    gets places as they become free, and a tenant that is alone can use all of them.

    A tenant is but a name that a client chooses. So names share what their host has: hosts have equal shares of all places,
    and the tenants of a host equal shares of the host's. There, all names that only claim count as one. A client that invents
    names thus takes nothing from other hosts. Clients behind one proxy are one host, and names that hold places there count.
    """

    def __init__(self, most: int, wait_s: Callable[[], float], clock: Callable[[], float] = time.monotonic):
        """`most`: number of places. `wait_s()` returns the retry delay of the next refusal in seconds."""
        self._most, self._wait_s, self._clock = most, wait_s, clock
        self._held: dict[str, Counter[str]] = {}  # host -> tenant -> its requests in flight
        self._claims: dict[tuple[str, str], float] = {}  # (host, tenant) -> when its claim ends
        self._running = 0

    @contextmanager
    def place(self, tenant: str, host: str = "") -> Iterator[None]:
        """Occupies a place for one request of `tenant` at `host` while the block runs.

        Raises ResourceExhausted if no place is free, or if the host or the tenant has its share and others have claims.
        """
        self._enter(tenant, host)
        try:
            yield
        finally:
            self._running -= 1
            own = self._held[host]
            own[tenant] -= 1
            if not own[tenant]:
                del own[tenant]
            if not own:
                del self._held[host]

    def _enter(self, tenant: str, host: str) -> None:
        now = self._clock()
        self._claims = {claim: ends for claim, ends in self._claims.items() if ends > now}
        waiting = {other for other, _ in self._claims}
        waiting_here = {name for other, name in self._claims if other == host and name != tenant}
        own = self._held.get(host, Counter())
        host_share = max(self._most // len(self._held.keys() | waiting | {host}), 1)
        names = len(own.keys() | {tenant}) + bool(waiting_here - own.keys())
        share = max(host_share // names, 1)
        at_host, held = own.total(), own[tenant]
        if self._running >= self._most:
            why = f"{self._running} requests are in flight, the most allowed"
            self._refuse(why, (host, tenant), now, claims=held < share and len(waiting_here) < MOST_CLAIMS)
        if at_host >= host_share and any(self._at(other) < host_share for other in waiting - {host}):
            why = f"{at_host} of this host's requests are in flight, its share while others wait"
            self._refuse(why, (host, tenant), now, claims=held < share and len(waiting_here) < MOST_CLAIMS)
        if held >= share and waiting_here:
            why = f"{held} of this tenant's requests are in flight, its share while others wait"
            self._refuse(why, (host, tenant), now, claims=False)
        self._claims.pop((host, tenant), None)
        self._running += 1
        self._held.setdefault(host, own)[tenant] += 1

    def _at(self, host: str) -> int:
        """Returns the number of a host's requests in flight."""
        return self._held[host].total() if host in self._held else 0

    def _refuse(self, why: str, claim: tuple[str, str], now: float, *, claims: bool) -> NoReturn:
        wait_s = self._wait_s()
        if claims:
            self._claims[claim] = now + 2.0 * wait_s
        raise ResourceExhausted(why, wait_s)
