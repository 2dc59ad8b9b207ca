"""A LocalCluster as the end-to-end tests share it: a real Redis, every trace kept, replicas added and drained at will."""

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
    """A running system, and the event loop that owns it."""

    cluster: LocalCluster
    receiver: TraceReceiver
    redis: EmbeddedRedis
    runner: asyncio.Runner

    def run(self, scenario: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """Runs `scenario` with a client of the gateway."""

        async def whole() -> T:
            async with Client(self.cluster.address) as client:
                return await scenario(client)

        return self.runner.run(whole())

    async def have(self, *replicas: int) -> None:
        """Adds and drains expert replicas until group g has `replicas[g]` of them."""
        for group, wanted in enumerate(replicas):
            for child in self.cluster.experts(group)[wanted:]:
                await self.cluster.drain(child)
        missing = [group for group, n in enumerate(replicas) for _ in range(n - len(self.cluster.experts(group)))]
        await asyncio.gather(*(self.cluster.add_expert(group) for group in missing))
