"""A live link outranks the registry: a replica that the registry no longer lists is called for as long as it answers."""

from __future__ import annotations

import pytest
from hop_scenarios import assert_layer, holder, hop_over

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
