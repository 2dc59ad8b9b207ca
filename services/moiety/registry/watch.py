"""Keeps a table of the live replicas in the registry up to date, and keeps the last table while the registry is down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from moiety.core.replica import Replica
from moiety.errors import RegistryUnreachable
from moiety.registry.interface import TTL_S, Registry

GRACE_S = TTL_S + 1.0

_log = logging.getLogger(__name__)


class Watch:
    """Polls `registry` every `interval_s` seconds and keeps a table of the live replicas. Three cases are distinguished:

    - *The registry does not answer*: the last table stays, and `stale_since` is set.
    - *The registry was emptied*, or answers again after an outage: replicas that it no longer lists stay in the table for
      GRACE_S, so that their heartbeats can register them again.
    - *An entry expired or was removed* from a working registry: the replica leaves the table.

    The third case does not prove that the replica is gone: a caller whose stream to the replica works keeps using it.
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

    async def start(self) -> None:
        """Polls the registry once, then in the background until `stop`. An unreachable registry raises no error."""
        await self.poll()
        self._task = asyncio.create_task(self._follow())

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
        except RegistryUnreachable as error:
            if self.stale_since is None:
                self.stale_since = self._clock()
                _log.warning("the last table of %d replicas stays in use: %s", len(self.replicas), error)
            return
        self._open_grace(generation)
        self.stale_since = None
        if self._clock() >= self._grace_ends:
            self._unconfirmed.clear()
        for replica_id in listed:
            self._unconfirmed.pop(replica_id, None)
        table = {**self._unconfirmed, **listed}
        await self._publish(tuple(table[replica_id] for replica_id in sorted(table)))

    def _open_grace(self, generation: str | None) -> None:
        """Starts the grace period if the registry was emptied or was unreachable: entries of live replicas may be missing."""
        emptied = self._generation is not None and generation != self._generation
        if emptied or self.stale_since is not None:
            self._unconfirmed = {replica.id: replica for replica in self.replicas}
            self._grace_ends = self._clock() + GRACE_S
            _log.warning(
                "the registry %s: the last table is kept for %g s", "was emptied" if emptied else "is back", GRACE_S
            )
        self._generation = generation

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
            try:
                await self.poll()
            except Exception:  # a bug, here or in a registry: without further polls the table would freeze
                _log.exception("the replica table could not be read")
