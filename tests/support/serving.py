"""A LocalCluster that the end-to-end tests share, with a real Redis and a receiver of its traces and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from moiety.client import Client
from moiety.local.cluster import LocalCluster
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.tools.trace.receiver import TraceReceiver

T = TypeVar("T")


@dataclass
class Served:
    """A running system, and the runner of the event loop that it belongs to."""

    cluster: LocalCluster
    receiver: TraceReceiver
    redis: EmbeddedRedis
    runner: asyncio.Runner

    def run(self, scenario: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """Runs `scenario` with a client of the gateway, which notices a loss soon, and returns its result."""

        async def with_client() -> T:
            quick = {"ping_every_s": 0.5, "ping_timeout_s": 1.0, "connect_timeout_s": 1.0}
            async with Client(self.cluster.address, **quick) as client:
                return await scenario(client)

        return self.runner.run(with_client())

    async def scale_experts(self, *replicas: int) -> None:
        """Adds and drains expert replicas until each group g has `replicas[g]` of them."""
        for group, wanted in enumerate(replicas):
            for child in self.cluster.experts(group)[wanted:]:
                await self.cluster.drain(child)
        missing = [group for group, n in enumerate(replicas) for _ in range(n - len(self.cluster.experts(group)))]
        await asyncio.gather(*(self.cluster.add_expert(group) for group in missing))

    async def scale_routers(self, wanted: int) -> None:
        """Adds and drains routers until there are `wanted`."""
        routers = self.cluster.replicas("router")
        for child in routers[wanted:]:
            await self.cluster.drain(child)
        await asyncio.gather(*(self.cluster.add_router() for _ in range(wanted - len(routers))))
