"""How an expert replica follows the placement: loads beside what it holds, tells, waits for the routers, drops."""

from __future__ import annotations

import logging
import time

from moiety.compose.background import at_low_priority
from moiety.core import ExpertSet, Role
from moiety.errors import RegistryUnreachable
from moiety.expert.runtime import Runtime
from moiety.load.registry import Registry
from moiety.load.watch import GRACE_S, Watch

_log = logging.getLogger(__name__)


class PlacementFollower:
    """Keeps one replica's experts in step with the placement in force; `default` is held where that names none.

    An expert that a placement takes away is answered until every live router of the same revision has acknowledged the
    epoch and every call that names it is answered: neither tokens nor requests notice, however long others take to load.
    """

    def __init__(
        self, runtime: Runtime, registry: Registry, deployment: str, default: ExpertSet, revision: str
    ) -> None:
        self._runtime, self._registry, self._deployment = runtime, registry, deployment
        self._default, self._revision = default, revision
        self._watch = Watch(registry)  # polled only while something is leaving
        self._nobody_before = 0.0  # a store that lists no router may just have been emptied

    async def start(self) -> None:
        """Loads what the placement says, or the default plan where the registry does not answer."""
        try:
            await self._load()
        except RegistryUnreachable as error:
            _log.warning("%s starts with the default plan: %s", self._deployment, error)
        if not self._runtime.holding.epoch:
            await self._hold(self._default, 0)

    async def follow(self) -> None:
        """To be called once a beat."""
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
        self._nobody_before = time.monotonic() + GRACE_S
        took = time.monotonic() - began
        _log.info("%s holds %s (epoch %d), read in %.2f s", self._deployment, held, epoch, took)

    async def _acknowledged(self, epoch: int) -> bool:
        await self._watch.poll()
        if self._watch.stale_since is not None:
            return False
        routers = [
            replica
            for replica in self._watch.replicas
            if (replica.role, replica.revision) == (Role.ROUTER, self._revision)
        ]
        if not routers:
            return time.monotonic() > self._nobody_before
        return all(router.placement_epoch >= epoch for router in routers)
