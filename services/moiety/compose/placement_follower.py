"""Makes an expert replica follow the placement: it loads the new experts, waits for the routers, drops the old ones."""

from __future__ import annotations

import logging
import time
from math import inf

from moiety.compose.background import at_low_priority
from moiety.core.experts import ExpertSet
from moiety.errors import MoietyError
from moiety.expert.runtime import Runtime
from moiety.registry.interface import HEARTBEAT_S, TTL_S, Registry

SEEN_S = 0.9 * HEARTBEAT_S

_log = logging.getLogger(__name__)


class PlacementFollower:
    """Loads and drops experts of one replica, so that it holds what the placement in force says.

    The replica holds `default` if no placement is in force or if the placement does not name its deployment. An expert
    that a placement takes away is served until every live router has acknowledged the placement's epoch and every call
    that names the expert is answered. So requests are served even if other replicas load slowly.
    """

    def __init__(self, runtime: Runtime, registry: Registry, deployment: str, default: ExpertSet) -> None:
        self._runtime, self._registry, self._deployment, self._default = runtime, registry, deployment, default
        self._agreed_at = inf  # time since which all routers seen have acknowledged the epoch; inf = not all yet

    async def start(self) -> None:
        """Loads the experts that the placement gives this replica, or `default` if there is none that can be followed."""
        try:
            await self._load()
        except MoietyError as error:  # a placement of experts that the model lacks must not stop replicas from starting
            _log.warning("%s starts with the default plan: %s", self._deployment, error)
        if not self._runtime.holding.epoch:
            await self._hold(self._default, 0)

    async def follow(self) -> None:
        """Follows a newer placement, and drops experts that routers no longer use. Called once per heartbeat."""
        if await self._registry.placement_epoch() > self._runtime.holding.epoch:
            await self._load()
        holding = self._runtime.holding
        if len(holding.leaving) and await self._acknowledged(holding.epoch) and self._runtime.drop_leaving():
            _log.info("%s dropped %s (epoch %d)", self._deployment, holding.leaving, holding.epoch)

    async def _load(self) -> None:
        placement = await self._registry.placement()
        if placement is not None and placement.epoch > self._runtime.holding.epoch:
            await self._hold(placement.held.get(self._deployment, self._default), placement.epoch)

    async def _hold(self, held: ExpertSet, epoch: int) -> None:
        began = time.monotonic()
        await at_low_priority(self._runtime.hold, held, epoch)
        self._agreed_at = inf
        took = time.monotonic() - began
        _log.info("%s holds %s (epoch %d), read in %.2f s", self._deployment, held, epoch, took)

    async def _acknowledged(self, epoch: int) -> bool:
        """Whether, at each look in the last SEEN_S, all listed routers had acknowledged `epoch`.

        One look is not enough: a registry that was just emptied lists few routers or none. If no router is listed now,
        the looks of the last TTL_S count.
        """
        agreed_at, self._agreed_at = self._agreed_at, inf
        await self._registry.check_writes()  # where writes are refused, routers that are not listed may live
        routers = await self._registry.routers()
        now = time.monotonic()
        if not all(router.placement_epoch >= epoch for router in routers):
            return False
        self._agreed_at = min(agreed_at, now)
        return now >= self._agreed_at + (SEEN_S if routers else TTL_S)
