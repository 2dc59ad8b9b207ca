"""When a service that drains may end. The registry tells who still sends it work, and who can take its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import inf

from moiety.compose.service_parts import ServiceParts
from moiety.core.experts import ExpertSet
from moiety.core.replica import Replica, ReplicaState, Role
from moiety.core.system import SystemId
from moiety.errors import RegistryUnreachable
from moiety.registry.interface import Registry

DRAIN_NOTICE_S = 0.6  # others read the registry every 0.25 s: after this time they prefer other services
SUCCESSOR_S = 5.0  # how long a service without a successor waits unused: that may need its place, such as a GPU
READ_S = 0.25  # between two looks into the registry
LOOK_S = 0.02  # between two looks at the work in flight

_CALLERS = {Role.ROUTER: Role.GATEWAY, Role.EXPERT: Role.ROUTER}  # role -> the role that sends it work


@dataclass(frozen=True, slots=True)
class _Others:
    """What other services, by the registry, are to one that drains."""

    use: bool = False  # some send it work
    replace: bool = False  # some can do all that it does
    supersede: bool = False  # the application goes on as another system


@dataclass(frozen=True, slots=True)
class Departure:
    """How a service leaves: what `until_unneeded` waits for.

    `system`: the service's own; None = the registry holds one system only. `own()` is its registry entry. `ending`: its
    whole system ends, so that nobody will take its place.
    """

    registry: Registry
    system: SystemId | None
    own: Callable[[], Replica]
    parts: ServiceParts
    ending: bool

    async def until_unneeded(self, until: float) -> None:
        """Returns once nobody needs the service, or at `until`, a time of the monotonic clock."""
        others, work, used_at, read_at = _Others(), self.parts.work(), time.monotonic(), -inf
        while (now := time.monotonic()) < until:
            if now >= read_at + READ_S:
                read_at = now
                with suppress(RegistryUnreachable):  # then what was read last counts
                    others = await self._others()
            idle = self.parts.idle()
            if not idle or self.parts.work() != work:
                work, used_at = self.parts.work(), now
            if self._may_end(others, idle, now - used_at):
                return
            await asyncio.sleep(LOOK_S)

    def _may_end(self, others: _Others, idle: bool, unused_s: float) -> bool:
        """Whether the service may end, after `unused_s` seconds without work."""
        is_gateway = self.parts.calls_end
        if is_gateway and not self.ending and (others.replace or others.supersede):
            return (
                True  # its servers let running requests end; new ones are for another gateway, which may need the port
            )
        if not idle:
            return False
        if self.ending or others.supersede:
            return not others.use
        waits = (others.use or is_gateway) and not others.replace
        return unused_s >= (SUCCESSOR_S if waits else DRAIN_NOTICE_S)

    async def _others(self) -> _Others:
        listed, own = await self.registry.replicas(), self.own()
        return _Others(depended_on(own, listed), replaced(own, listed), await self._superseded(listed))

    async def _superseded(self, listed: Iterable[Replica]) -> bool:
        """Whether the application goes on as another system, with another model, say, and all of this one drains."""
        if self.system is None or any(replica.state is not ReplicaState.DRAINING for replica in listed):
            return False
        own = (self.system.app, self.system.cluster)
        return any((one.app, one.cluster) == own and one != self.system for one in await self.registry.systems())


def depended_on(own: Replica, listed: Iterable[Replica]) -> bool:
    """Whether a service that sends work to `own` is live: a gateway for a router, a router for an expert replica."""
    return any(replica.role is _CALLERS.get(own.role) for replica in listed)


def replaced(own: Replica, listed: Iterable[Replica]) -> bool:
    """Whether READY services can do all that `own` does. Of an expert replica: they hold all its experts."""
    others = [
        replica
        for replica in listed
        if replica.id != own.id and replica.role is own.role and replica.state is ReplicaState.READY
    ]
    if own.role is not Role.EXPERT:
        return bool(others)
    left: ExpertSet = own.held | own.leaving
    for other in sorted(others, key=lambda other: other.deployment != own.deployment):  # its own group's are enough
        if not left:
            break
        left = left - (other.held | other.leaving)
    return not left
