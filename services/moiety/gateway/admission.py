"""How many requests a gateway has in flight, and whose: the bound, and a fair share of it for every tenant.

Nothing waits here: waiting is the routers' business, which know what they can do. Who is refused comes again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from moiety.errors import InvalidRequest, ResourceExhausted
from moiety.v1 import generation_pb2

MAX_TENANT = 128
MAX_PRIORITY = 100


def check_standing(request: generation_pb2.GenerateRequest) -> None:
    """Raises InvalidRequest unless priority and tenant are within their bounds."""
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", request.priority, f"{-MAX_PRIORITY} to {MAX_PRIORITY}")
    if len(request.tenant) > MAX_TENANT:
        raise InvalidRequest("tenant", request.tenant, f"at most {MAX_TENANT} characters")


class Admission:
    """The places of one gateway.

    Any tenant may take any free place. A tenant that is refused has a claim for as long as twice the time after which
    it is told to come again: while others have claims, nobody goes beyond an equal share. So whoever came late gets
    places as they become free, and a tenant that is alone can use them all.
    """

    def __init__(self, most: int, wait_s: Callable[[], float], clock: Callable[[], float] = time.monotonic):
        """`most` requests at once; `wait_s` tells how long it may take until there is room again."""
        self._most, self._wait_s, self._clock = most, wait_s, clock
        self._held: Counter[str] = Counter()
        self._claims: dict[str, float] = {}  # tenant -> when its claim ends; oldest first
        self._running = 0

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """A place for one request. Raises ResourceExhausted where there is none for this tenant."""
        self._enter(tenant)
        try:
            yield
        finally:
            self._running -= 1
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]

    def _enter(self, tenant: str) -> None:
        now = self._clock()
        self._claims = {other: ends for other, ends in self._claims.items() if ends > now}
        tenants = self._held.keys() | self._claims.keys() | {tenant}
        share = max(self._most // len(tenants), 1)
        held, waited_for = self._held[tenant], bool(self._claims.keys() - {tenant})
        if self._running >= self._most:
            self._refuse(tenant, now, held < share, f"{self._running} requests are in flight, the most allowed")
        if waited_for and held >= share:
            why = f"{held} of this tenant's requests are in flight, its share while others wait"
            self._refuse(tenant, now, False, why)
        self._claims.pop(tenant, None)
        self._running += 1
        self._held[tenant] += 1

    def _refuse(self, tenant: str, now: float, claims: bool, why: str) -> NoReturn:
        wait_s = self._wait_s()
        if claims and len(self._claims) < self._most:
            self._claims[tenant] = now + 2.0 * wait_s
        raise ResourceExhausted(why, wait_s)
