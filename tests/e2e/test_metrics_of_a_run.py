"""The figures that a running system exports over OTLP."""

from __future__ import annotations

import asyncio
import time

from moiety.client import Client
from moiety.telemetry import MetricName
from support.serving import Served


def test_services_tell_how_they_are(served: Served) -> None:
    """Every service its load, the router its rows, exactly those of the ledger, and how well its cost model fits."""

    async def scenario(client: Client) -> None:
        _ = [chunk async for chunk in client.generate([3, 1, 4, 1, 5], max_tokens=8, ignore_eos=True)]
        until = time.monotonic() + 10.0
        while True:
            figures = served.receiver.figures()
            routed = [each.value for each in figures if each.name == MetricName.ROUTED_ROWS]
            demand = await served.cluster.registry.expert_demand()
            counted = [sum(map(sum, each.rows)) for each in demand.values()]
            errors = [each.value for each in figures if each.name == MetricName.COST_ERROR]
            if errors and routed and max(counted) > 0 and max(routed) == max(counted):
                break
            assert time.monotonic() < until, (routed, counted, errors)
            await asyncio.sleep(0.05)
        assert min(errors) >= 0.0
        services = {f"moiety-{child.replica.deployment}" for child in served.cluster.children}
        for name in (MetricName.BUSY, MetricName.QUEUE_WAIT):
            assert {each.service for each in figures if each.name == name} >= services
        assert {each.value for each in figures if each.name == MetricName.REROUTED_ROWS} == {0}

    served.run(scenario)
