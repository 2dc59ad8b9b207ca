"""Reports to the registry which experts requests wait for, so that the autoscaler can start their group again."""

from __future__ import annotations

import asyncio
import logging
import time

from moiety.core.supervise import spawn
from moiety.errors import MoietyError
from moiety.registry.interface import Registry

REPEAT_S = 0.5  # between reports of a layer: reports expire after 5 s, a parked layer calls 20 times a second

_log = logging.getLogger(__name__)


class MissingExpertReporter:
    """Reports the experts that a parked layer waits for.

    The engine's thread calls it; the event loop on which it was created writes to the registry.
    """

    def __init__(self, registry: Registry):
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._due: dict[int, float] = {}  # layer -> time.monotonic() of its next report

    def __call__(self, layer: int, experts: list[int]) -> None:
        """Schedules a report unless one was scheduled for `layer` within REPEAT_S. Does not wait for the registry."""
        if (now := time.monotonic()) >= self._due.get(layer, 0.0):
            self._due[layer] = now + REPEAT_S
            self._loop.call_soon_threadsafe(lambda: spawn("missing experts", self._record(layer, experts)))

    async def _record(self, layer: int, experts: list[int]) -> None:
        try:
            await self._registry.report_missing_experts(layer, experts)
        except MoietyError as error:
            _log.debug("missing experts of layer %d were not reported: %s", layer, error)
