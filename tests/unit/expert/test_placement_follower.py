"""An expert replica follows the placement: nothing is dropped before every router that counts has acknowledged."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from expert_support import MakeRuntime

from moiety.compose.placement_follower import SEEN_S, PlacementFollower
from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement, Replica, Role
from moiety.errors import RegistryUnreachable
from moiety.registry.interface import TTL_S
from moiety.registry.memory import MemoryRegistry

HELD, NEXT = ExpertSet.block(3, [0, 1]), ExpertSet.block(3, [1, 2])
LEAVING = ExpertSet.block(3, [0])
ROUTER = Replica("r1", Role.ROUTER, "router", "h:1", "n", "m", "revision", placement_epoch=0)


def test_it_waits_for_every_router_of_its_revision(make_runtime: MakeRuntime) -> None:
    """Two routers: one has acknowledged, one has not; then both, for a beat. One of another revision is no matter."""

    async def check() -> None:
        registry, runtime = MemoryRegistry(clock=lambda: 0.0), make_runtime(HELD)
        follower = PlacementFollower(runtime, registry, "experts-0", HELD, "revision")
        await registry.register(replace(ROUTER, placement_epoch=1))
        await registry.register(replace(ROUTER, id="r2"))
        await registry.register(replace(ROUTER, id="r3", revision="another"))
        assert await registry.set_placement(Placement(1, {"experts-0": NEXT}))
        for _ in range(3):
            await follower.follow()
            await asyncio.sleep(SEEN_S)
            holding = runtime.holding
            assert (holding.held, holding.leaving, holding.epoch) == (NEXT, LEAVING, 1)
        await registry.register(replace(ROUTER, id="r2", placement_epoch=1))
        await follower.follow()
        assert runtime.holding.leaving == LEAVING  # a store that was just emptied may list few routers
        await asyncio.sleep(SEEN_S)
        await follower.follow()
        assert len(runtime.holding.leaving) == 0

    asyncio.run(check())


def test_where_no_router_is_listed_it_waits_longer(make_runtime: MakeRuntime) -> None:
    """Nobody there is what an emptied store says too: entries get the time that they live to come back."""

    async def check() -> None:
        registry, runtime = MemoryRegistry(clock=lambda: 0.0), make_runtime(HELD)
        follower = PlacementFollower(runtime, registry, "experts-0", HELD, "revision")
        assert await registry.set_placement(Placement(1, {"experts-0": NEXT}))
        began = time.monotonic()
        while len((await _followed(follower, runtime)).leaving):
            assert time.monotonic() - began < TTL_S + 5
        assert time.monotonic() - began >= TTL_S

    asyncio.run(check())


def test_a_deployment_that_is_not_named_holds_its_default(make_runtime: MakeRuntime) -> None:
    """And takes part in the epoch all the same: routers wait for everybody."""

    async def check() -> None:
        registry, runtime = MemoryRegistry(clock=lambda: 0.0), make_runtime(ExpertSet())
        follower = PlacementFollower(runtime, registry, "experts-0", HELD, "revision")
        assert await registry.set_placement(Placement(4, {"experts-1": NEXT}))
        await follower.start()
        assert (runtime.holding.held, runtime.holding.epoch) == (HELD, 4)

    asyncio.run(check())


def test_without_a_registry_it_starts_with_the_default(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deterministic plan is known to everybody: no registry is needed to agree on it."""

    async def silent() -> None:
        raise RegistryUnreachable("nobody answers")

    async def check() -> None:
        registry, runtime = MemoryRegistry(), make_runtime(ExpertSet())
        monkeypatch.setattr(registry, "placement", silent)
        await PlacementFollower(runtime, registry, "experts-0", HELD, "revision").start()
        assert (runtime.holding.held, runtime.holding.epoch) == (HELD, 0)

    asyncio.run(check())


async def _followed(follower: PlacementFollower, runtime):
    await follower.follow()
    await asyncio.sleep(0.1)
    return runtime.holding
