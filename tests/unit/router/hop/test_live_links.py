"""A live link outranks the registry: a replica that the registry no longer lists is called for as long as it answers."""

from __future__ import annotations

import asyncio
import time

import pytest
from hop_scenarios import assert_layer, holder, hop_over

from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.router.hop.call_limits import FLOOR_S
from moiety.router.hop.fleet import FOLLOW_S
from moiety.testing import eventually

pytestmark = pytest.mark.usefixtures("each_transport")


async def test_a_replica_that_answers_stays_in_use_though_it_is_not_listed():
    """Its entry expires, and it still computes; once its link breaks it leaves."""
    linked = holder("a")
    async with hop_over(linked) as lane:
        await assert_layer(lane)
        await lane.registry.deregister("a")
        await eventually(lambda: not lane.watch.replicas)
        for _ in range(3):
            await assert_layer(lane)
        await linked.vanish()
        await eventually(lambda: not lane.fleet.table.replicas)


async def test_what_is_remembered_of_a_replica_lasts_as_long_as_its_link():
    """Its breaker and its limit survive the loss of its entry; once its link has broken, too, both are forgotten."""
    linked = holder("a")
    async with hop_over(linked) as lane:
        await assert_layer(lane)
        slow = ForwardResponse(queue_ms=60_000.0)
        lane.hop.context.limits.record("a", slow, took_s=60.0)
        lane.fleet.breakers.failed("a", time.monotonic() + 60.0, "known", certain=True)
        await lane.registry.deregister("a")
        await eventually(lambda: not lane.watch.replicas)
        await asyncio.sleep(2 * FOLLOW_S)  # for what must not happen
        lane.hop.poll()
        assert lane.fleet.breakers.open == {"a"}
        assert lane.hop.context.limit_s("a", 1) > 60.0
        await linked.vanish()

        def forgotten() -> bool:
            lane.hop.poll()
            return not lane.fleet.breakers.open and lane.hop.context.limit_s("a", 1) == FLOOR_S

        await eventually(forgotten)
