"""Measures how full a router is. Routers are scaled on these readings."""

from __future__ import annotations

import time
from collections.abc import Callable

from moiety.core.load import ReplicaLoad
from moiety.policy.autoscale import router_busy
from moiety.router.engine import Engine


class RouterLoad:
    """Reads one engine's load. The wait and the rates of a reading cover the time since the previous reading."""

    def __init__(self, engine: Engine, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._slots, self._clock = engine, slots, clock
        self._since, self._admitted, self._waited_s = clock(), 0, 0.0

    def reading(self) -> ReplicaLoad:
        """Returns the load since the previous reading.

        `busy` is the used part of the slots or of the KV blocks, whichever is larger, at the time of the call. `rows_per_s`
        and `calls_per_s` both count admitted requests. If requests wait and none was admitted, the queue wait is the whole
        time since the previous reading.
        """
        load, now = self._engine.load, self._clock()
        elapsed = max(now - self._since, 1e-6)
        admitted, waited_s = load.admitted - self._admitted, load.waited_s - self._waited_s
        self._since, self._admitted, self._waited_s = now, load.admitted, load.waited_s
        wait_s = waited_s / admitted if admitted else elapsed * (load.waiting > 0)
        blocks = self._engine.blocks
        return ReplicaLoad(
            busy=min(1.0, router_busy(load.running, self._slots, blocks - load.free_blocks, blocks)),
            queue_wait_ms=1000 * wait_s,
            rows_per_s=admitted / elapsed,
            calls_per_s=admitted / elapsed,
        )
