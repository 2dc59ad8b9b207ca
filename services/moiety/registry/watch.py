"""Keeps a table of the live replicas in the registry up to date, and keeps the last table while the registry is down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from moiety.core.replica import Replica
from moiety.core.supervise import supervise
from moiety.errors import RegistryUnreachable, WritesRefused
from moiety.registry.interface import TTL_S, Registry

GRACE_S = TTL_S + 1.0

_log = logging.getLogger(__name__)


class Watch:
    """Polls `registry` every `interval_s` seconds and keeps a table of the live replicas. Four cases are distinguished:

    - *The registry does not answer*: the last table stays, and `stale_since` is set.
    - *The registry refuses writes*: no replica can renew its entry, so an expired one proves nothing. The replicas that
      are no longer listed stay in the table, and `refused` is set. The watch asks only if a replica is missing.
    - *The registry was emptied*, recovers from one of the above, or loses most of its entries at once: replicas that it
      no longer lists stay in the table for GRACE_S, so that their heartbeats can register them again.
    - *An entry expired or was removed* from a working registry: the replica leaves the table.

    The last case does not prove that the replica is gone: a caller whose stream to the replica works keeps using it. If Redis
    evicts the entry of a live replica, the replica is back after its next beat.
    """

    def __init__(
        self,
        registry: Registry,
        interval_s: float = 0.25,
        *,
        on_change: Callable[[tuple[Replica, ...]], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._interval_s = interval_s
        self._on_change = on_change
        self._clock = clock
        self._generation: str | None = None
        self._unconfirmed: dict[str, Replica] = {}  # known before the store was emptied, not listed since
        self._grace_ends = 0.0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.replicas: tuple[Replica, ...] = ()  # sorted by id
        self.stale_since: float | None = None  # in seconds of `clock`; None while the registry answers
        self.refused: str | None = None  # why the registry refuses writes, if replicas are missing from its list

    async def start(self) -> None:
        """Polls the registry once, then in the background until `stop`. An unreachable registry raises no error."""
        await self.poll()
        self._task = supervise("registry watch", self._follow)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def until(self, condition: Callable[[tuple[Replica, ...]], bool]) -> tuple[Replica, ...]:
        """Waits until the replica table meets `condition` and returns the table; the caller sets the time limit."""
        while not condition(self.replicas):
            await self._changed.wait()
        return self.replicas

    async def poll(self) -> None:
        """Reads the registry now and updates the table. Does not raise if the registry is unreachable."""
        try:
            listed = {replica.id: replica for replica in await self._registry.replicas()}
            generation = await self._registry.generation()
            missing = {replica.id for replica in self.replicas} - listed.keys()
            refused = await self._refusal() if missing else None
        except RegistryUnreachable as error:
            if self.stale_since is None:
                self.stale_since = self._clock()
                _log.warning("the last table of %d replicas stays in use: %s", len(self.replicas), error)
            return
        if (doubt := self._doubt(missing, generation, refused)) is not None:
            if refused is None or self.refused is None:
                _log.warning("replicas that are no longer listed stay in the table for now: %s", doubt)
            self._unconfirmed = {replica.id: replica for replica in self.replicas}
            self._grace_ends = self._clock() + GRACE_S
        self._generation, self.stale_since, self.refused = generation, None, refused
        if self._clock() >= self._grace_ends:
            self._unconfirmed.clear()
        for replica_id in listed:
            self._unconfirmed.pop(replica_id, None)
        table = {**self._unconfirmed, **listed}
        await self._publish(tuple(table[replica_id] for replica_id in sorted(table)))

    async def _refusal(self) -> str | None:
        """Returns why the registry refuses writes; None if it takes them."""
        try:
            await self._registry.check_writes()
        except WritesRefused as error:
            return str(error)
        return None

    def _doubt(self, missing: set[str], generation: str | None, refused: str | None) -> str | None:
        """Returns why `missing` replicas, which are no longer listed, may be live; None if nothing speaks for it."""
        vanished = len(missing - self._unconfirmed.keys())
        if refused is not None:
            return refused
        if self._generation is not None and generation != self._generation:
            return "the registry was emptied"
        if self.stale_since is not None or self.refused is not None:
            return "the registry is back"
        # For instance, Redis has just become a primary: until then it had listed entries that had expired.
        if vanished > max(1, len(self.replicas) // 2):
            return f"{vanished} of {len(self.replicas)} entries are gone at once"
        return None

    async def _publish(self, table: tuple[Replica, ...]) -> None:
        if table == self.replicas:
            return
        self.replicas = table
        self._changed.set()
        self._changed = asyncio.Event()
        if self._on_change is not None:
            try:
                await self._on_change(table)
            except Exception:
                _log.exception("the callback on a change of the replica table failed")

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self.poll()
