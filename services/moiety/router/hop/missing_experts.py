"""Tells the registry which experts requests wait for, so that the policy can bring their group back."""

from __future__ import annotations

import asyncio
import logging
import time

from moiety.errors import MoietyError
from moiety.registry.interface import Registry

REPEAT_S = 0.5  # wakes expire after five seconds; a parked layer looks around twenty times a second

_log = logging.getLogger(__name__)


class MissingExpertReporter:
    """Called by the engine's thread while a layer is parked; writes on the loop it was made on."""

    def __init__(self, registry: Registry):
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._due: dict[int, float] = {}  # layer -> when it may be told again

    def __call__(self, layer: int, experts: list[int]) -> None:
        """Never blocks, never raises."""
        if (now := time.monotonic()) >= self._due.get(layer, 0.0):
            self._due[layer] = now + REPEAT_S
            asyncio.run_coroutine_threadsafe(self._record(layer, experts), self._loop)

    async def _record(self, layer: int, experts: list[int]) -> None:
        try:
            await self._registry.report_missing_experts(layer, experts)
        except MoietyError as error:
            _log.debug("the wake of layer %d was not recorded: %s", layer, error)
