"""The breakers of a router, one per expert replica: what it remembers between calls of how each replica answers.

A breaker opens after a few failures in a row, or at once for a proof that the device is sick. An open replica is called only
for experts without another usable holder. After a delay, which grows with each further failure, one call probes it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

FAILURES = 3  # in a row, that open a breaker
DELAY_S = 1.0  # until the first probe; doubled with each further failure
LONGEST_DELAY_S = 30.0
STEADY_S = 60.0  # a replica that has answered well for this long begins with the first delay again
REST_S = 0.01  # how long an overloaded replica is avoided first; doubled with each further refusal
LONGEST_REST_S = 1.0
STUCK_LIMITS = 3.0  # limits of a call without any answer, after which a late replica counts as stuck

_NONE: frozenset[str] = frozenset()
_log = logging.getLogger(__name__)


class BreakerState(StrEnum):
    """How far a replica is trusted."""

    CLOSED = "closed"
    LATE = "late"  # a second holder overtook one of its calls, and it has answered nothing since: avoided, not accused
    OPEN = "open"
    PROBED = "probed"  # open, and a call has been sent that will show whether it has recovered


@dataclass(slots=True, eq=False)
class _Breaker:
    """What is remembered of one replica. Times are seconds of one monotonic clock, which the caller passes in."""

    state: BreakerState = BreakerState.CLOSED
    failures: int = 0  # in a row
    silent: bool = False  # it is open because it did not answer: any answer closes it
    since: float = 0.0  # when it opened or closed
    until: float = 0.0  # LATE: when it counts as stuck; OPEN and PROBED: when it may be probed next
    delay_s: float = DELAY_S  # the next delay between opening and probe
    rest_s: float = REST_S
    rests_until: float = 0.0  # an overloaded replica

    @property
    def is_open(self) -> bool:
        return self.state in (BreakerState.OPEN, BreakerState.PROBED)

    def avoided(self, now: float) -> bool:
        probe_due = self.state is not BreakerState.LATE and now >= self.until
        return now < self.rests_until or (self.state is not BreakerState.CLOSED and not probe_due)


class Breakers:
    """The breakers of all replicas. Used by the engine's thread; `sick` and `draining` may be replaced by any thread."""

    def __init__(self) -> None:
        self.sick: frozenset[str] = _NONE  # replicas that the registry lists as sick: avoided like open ones
        self.draining: frozenset[str] = _NONE  # about to leave: avoided, not accused
        self.changes = 0  # breakers opened or closed since the start
        self._breakers: dict[str, _Breaker] = {}  # of replicas of which there is something to remember

    @property
    def open(self) -> frozenset[str]:
        """The replicas whose breaker is open. From any thread."""
        return frozenset(replica for replica, breaker in tuple(self._breakers.items()) if breaker.is_open)

    def avoided(self, now: float) -> frozenset[str]:
        """Returns the replicas to call only for experts that have no other holder."""
        if not self._breakers:
            return self.sick | self.draining
        for replica, breaker in tuple(self._breakers.items()):
            if breaker.state is BreakerState.LATE and now >= breaker.until:
                self._open(replica, breaker, now, f"it has not answered for {now - breaker.since:.1f} s", silent=True)
            elif breaker.state is BreakerState.CLOSED and now >= max(breaker.since + STEADY_S, breaker.rests_until):
                del self._breakers[replica]
        return self.sick.union(
            self.draining, (replica for replica, breaker in self._breakers.items() if breaker.avoided(now))
        )

    def closed(self, replica: str) -> bool:
        """Whether nothing speaks against `replica`. Only then its answer may show that another one's was right."""
        breaker = self._breakers.get(replica)
        return replica not in self.sick and (breaker is None or breaker.state is BreakerState.CLOSED)

    def sent(self, replica: str, now: float) -> bool:
        """Notes that a call goes to `replica`. Returns whether the call is a probe."""
        breaker = self._breakers.get(replica) if self._breakers else None
        if breaker is None or not breaker.is_open or now < breaker.until:
            return False
        breaker.state, breaker.until = BreakerState.PROBED, now + breaker.delay_s
        return True

    def answered(self, replica: str, now: float) -> None:
        """Notes any answer, good or bad, late or not: the replica is not stuck."""
        if self._breakers and (breaker := self._breakers.get(replica)) is not None:
            if breaker.state is BreakerState.LATE:
                breaker.state, breaker.since = BreakerState.CLOSED, now
            elif breaker.is_open and breaker.silent:
                self._close(replica, breaker, now)

    def succeeded(self, replica: str, now: float) -> None:
        """Notes a good answer, which ends a row of failures and closes the breaker."""
        if self._breakers and (breaker := self._breakers.get(replica)) is not None:
            breaker.failures, breaker.rest_s, breaker.rests_until = 0, REST_S, 0.0
            if breaker.is_open:
                self._close(replica, breaker, now)

    def failed(self, replica: str, now: float, why: str, *, certain: bool = False) -> None:
        """Notes a failure. `certain`: it proves that the device is sick, so the breaker opens at once."""
        breaker = self._breakers.setdefault(replica, _Breaker(since=now))
        breaker.failures += 1
        if breaker.state is BreakerState.PROBED:
            breaker.state, breaker.until = BreakerState.OPEN, now + breaker.delay_s
            breaker.delay_s = min(2 * breaker.delay_s, LONGEST_DELAY_S)
        elif not breaker.is_open and (certain or breaker.failures >= FAILURES):
            count = "" if certain else f"{breaker.failures} failures in a row, last: "
            self._open(replica, breaker, now, count + why, silent=False)

    def overtaken(self, replica: str, now: float, limit_s: float) -> None:
        """Notes that another holder answered first. If STUCK_LIMITS times `limit_s` bring no answer, the replica is stuck."""
        breaker = self._breakers.setdefault(replica, _Breaker(since=now))
        if breaker.state is BreakerState.CLOSED:
            breaker.state, breaker.since, breaker.until = BreakerState.LATE, now, now + STUCK_LIMITS * limit_s
        elif breaker.state is BreakerState.PROBED:
            self.failed(replica, now, "it did not answer in time")

    def silent(self, replica: str, now: float, waited_s: float, limit_s: float) -> None:
        """Notes that an only holder has answered nothing for `waited_s` seconds, where a call should take `limit_s` at most."""
        if waited_s >= STUCK_LIMITS * limit_s and self.closed(replica):
            breaker = self._breakers.setdefault(replica, _Breaker(since=now))
            self._open(replica, breaker, now, f"it has not answered for {waited_s:.1f} s", silent=True)

    def overloaded(self, replica: str, now: float) -> None:
        """Notes that a replica has no room. It rests for a moment, which grows while it goes on refusing."""
        breaker = self._breakers.setdefault(replica, _Breaker(since=now))
        if now >= breaker.rests_until:  # calls that were refused together count once
            breaker.rests_until = now + breaker.rest_s
            breaker.rest_s = min(2 * breaker.rest_s, LONGEST_REST_S)

    def keep(self, replicas: Collection[str]) -> None:
        """Forgets all replicas but `replicas`."""
        self._breakers = {replica: breaker for replica, breaker in self._breakers.items() if replica in replicas}

    def _open(self, replica: str, breaker: _Breaker, now: float, why: str, *, silent: bool) -> None:
        breaker.state, breaker.silent, breaker.since = BreakerState.OPEN, silent, now
        breaker.until = now + breaker.delay_s
        breaker.delay_s = min(2 * breaker.delay_s, LONGEST_DELAY_S)
        self.changes += 1
        after_s = breaker.until - now
        _log.warning(
            "replica %s is avoided where another holds its experts: %s; next try in %g s", replica, why, after_s
        )

    def _close(self, replica: str, breaker: _Breaker, now: float) -> None:
        open_s, breaker.state, breaker.since, breaker.failures = now - breaker.since, BreakerState.CLOSED, now, 0
        self.changes += 1
        _log.info("replica %s is used again, after %.1f s", replica, open_s)
