"""The metrics that a running system exports over OTLP."""

from __future__ import annotations

import asyncio
import time

from moiety.client import Client
from moiety.telemetry import MetricName
from support.serving import Served


def test_services_export_load_rows_and_cost_error(served: Served) -> None:
    """Every service exports its load; the router exports the ledger's exact row count and the error of its cost model."""

    async def scenario(client: Client) -> None:
        _ = [chunk async for chunk in client.generate([3, 1, 4, 1, 5], max_tokens=8, ignore_eos=True)]
        deadline = time.monotonic() + 60.0
        while True:
            figures = served.receiver.metrics()
            routed = [figure.value for figure in figures if figure.name == MetricName.ROUTED_ROWS]
            demand = await served.cluster.registry.expert_demand()
            counted = [sum(map(sum, counters.rows)) for counters in demand.values()]
            errors = [figure.value for figure in figures if figure.name == MetricName.COST_ERROR]
            if (
                errors and max(counted) > 0 and set(counted) <= set(routed)
            ):  # routers that have left exported theirs, too
                break
            assert time.monotonic() < deadline, (routed, counted, errors)
            await asyncio.sleep(0.05)
        assert min(errors) >= 0.0
        services = {f"moiety-{child.replica.deployment}" for child in served.cluster.children}
        for name in (MetricName.BUSY, MetricName.QUEUE_WAIT, MetricName.TASK_FAILURES, MetricName.REGISTERED):
            assert {figure.service for figure in figures if figure.name == name} >= services
        assert {figure.value for figure in figures if figure.name == MetricName.REROUTED_ROWS} == {0}

    served.run(scenario)
