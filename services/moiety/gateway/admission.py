"""Limits the requests that a gateway has in flight, and gives each tenant a fair share of that limit.

No request waits here: routers queue requests, since they know their own capacity. A refused client retries later.
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


def check_priority_and_tenant(request: generation_pb2.GenerateRequest) -> None:
    """Raises InvalidRequest unless priority and tenant are within their bounds."""
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", request.priority, f"{-MAX_PRIORITY} to {MAX_PRIORITY}")
    if len(request.tenant) > MAX_TENANT:
        raise InvalidRequest("tenant", request.tenant, f"at most {MAX_TENANT} characters")


class Admission:
    """Gives out the places of one gateway; each request in flight occupies one.

    Any tenant may take any free place. A tenant that has less than an equal share when it is refused gets a claim, which
    lasts twice the retry delay of the refusal. While other tenants have claims, no tenant may exceed an equal share. So a
    tenant that comes late gets places as they become free, and a tenant that is alone can use all of them.
    """

    def __init__(self, most: int, wait_s: Callable[[], float], clock: Callable[[], float] = time.monotonic):
        """`most`: number of places. `wait_s()` returns the retry delay of the next refusal in seconds."""
        self._most, self._wait_s, self._clock = most, wait_s, clock
        self._held: Counter[str] = Counter()
        self._claims: dict[str, float] = {}  # tenant -> when its claim ends; oldest first
        self._running = 0

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Occupies a place for one request of `tenant` while the block runs.

        Raises ResourceExhausted if no place is free, or if the tenant has its share and others have claims.
        """
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
        held, others_claim = self._held[tenant], bool(self._claims.keys() - {tenant})
        if self._running >= self._most:
            self._refuse(tenant, now, held < share, f"{self._running} requests are in flight, the most allowed")
        if others_claim and held >= share:
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
