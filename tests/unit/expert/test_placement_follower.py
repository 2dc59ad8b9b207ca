"""An expert replica follows the placement: it drops no expert before every router has acknowledged."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from expert_support import MakeRuntime

from moiety.compose.placement_follower import SEEN_S, PlacementFollower
from moiety.core.experts import ExpertSet
from moiety.core.replica import Placement, Replica, Role
from moiety.errors import RegistryUnreachable, WritesRefused
from moiety.registry.interface import TTL_S
from moiety.registry.memory import MemoryRegistry

HELD, NEXT = ExpertSet.uniform(3, [0, 1]), ExpertSet.uniform(3, [1, 2])
LEAVING = ExpertSet.uniform(3, [0])
ROUTER = Replica("r1", Role.ROUTER, "router", "h:1", "n", "m", "revision", placement_epoch=0)


async def test_it_waits_for_every_router(make_runtime: MakeRuntime) -> None:
    """Experts are dropped once both routers have acknowledged for SEEN_S."""
    registry, runtime = MemoryRegistry(clock=lambda: 0.0), make_runtime(HELD)
    follower = PlacementFollower(runtime, registry, "experts-0", HELD)
    await registry.register(replace(ROUTER, placement_epoch=1))
    await registry.register(replace(ROUTER, id="r2"))
    assert await registry.set_placement(Placement(1, {"experts-0": NEXT}))
    for _ in range(3):
        await follower.follow()
        await asyncio.sleep(SEEN_S)
        holding = runtime.holding
        assert (holding.held, holding.leaving, holding.epoch) == (NEXT, LEAVING, 1)
    await registry.register(replace(ROUTER, id="r2", placement_epoch=1))
    await follower.follow()
    assert runtime.holding.leaving == LEAVING  # a store that was just emptied may not list all routers yet
    await asyncio.sleep(SEEN_S)
    await follower.follow()
    assert len(runtime.holding.leaving) == 0


async def test_where_no_router_is_listed_it_waits_longer(make_runtime: MakeRuntime) -> None:
    """Without a listed router it waits TTL_S: an emptied store lists none either, until they have registered again."""
    registry, runtime = MemoryRegistry(clock=lambda: 0.0), make_runtime(HELD)
    follower = PlacementFollower(runtime, registry, "experts-0", HELD)
    assert await registry.set_placement(Placement(1, {"experts-0": NEXT}))
    began = time.monotonic()
    while len((await _followed(follower, runtime)).leaving):
        assert time.monotonic() - began < TTL_S + 5
    assert time.monotonic() - began >= TTL_S


async def test_while_writes_are_refused_nothing_is_dropped(make_runtime: MakeRuntime) -> None:
    """A router whose entry has expired because the store refuses writes may still use the old experts: it counts later."""
    store: dict[str, float | bool] = {"now": 0.0, "refuses": False}

    class Refusing(MemoryRegistry):
        async def check_writes(self) -> None:
            if store["refuses"]:
                raise WritesRefused("OOM")

    registry, runtime = Refusing(clock=lambda: store["now"]), make_runtime(HELD)
    follower = PlacementFollower(runtime, registry, "experts-0", HELD)
    await registry.register(replace(ROUTER, placement_epoch=1))
    assert await registry.set_placement(Placement(1, {"experts-0": NEXT}))
    await follower.follow()  # the router has acknowledged, for the first time
    await asyncio.sleep(SEEN_S)
    store.update(now=2 * TTL_S, refuses=True)
    with pytest.raises(WritesRefused):
        await follower.follow()
    store["refuses"] = False
    await follower.follow()
    assert runtime.holding.leaving == LEAVING  # what it saw before counts no more


async def test_a_deployment_that_is_not_named_holds_its_default(make_runtime: MakeRuntime) -> None:
    """A deployment that the placement does not name holds its default under the new epoch: routers wait for all."""
    registry, runtime = MemoryRegistry(clock=lambda: 0.0), make_runtime(ExpertSet())
    follower = PlacementFollower(runtime, registry, "experts-0", HELD)
    assert await registry.set_placement(Placement(4, {"experts-1": NEXT}))
    await follower.start()
    assert (runtime.holding.held, runtime.holding.epoch) == (HELD, 4)


async def test_without_a_registry_it_starts_with_the_default(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a registry it holds the default, on which all services agree because it is deterministic."""

    async def silent() -> None:
        raise RegistryUnreachable("nobody answers")

    registry, runtime = MemoryRegistry(), make_runtime(ExpertSet())
    monkeypatch.setattr(registry, "placement", silent)
    await PlacementFollower(runtime, registry, "experts-0", HELD).start()
    assert (runtime.holding.held, runtime.holding.epoch) == (HELD, 0)


async def _followed(follower: PlacementFollower, runtime):
    await follower.follow()
    await asyncio.sleep(0.1)
    return runtime.holding
