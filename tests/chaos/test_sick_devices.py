"""A device that raises, gives NaN or hangs on every batch: nobody's tokens change, and the replica says that it is sick."""

from __future__ import annotations

import asyncio

import pytest
from chaos_support import NEW_TOKENS, STRIKE_AT, assert_serves_on
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moiety.client import Client
from moiety.core.replica import ReplicaState
from moiety.errors import FailedPrecondition, MoietyError
from moiety.local.child_process import Child
from moiety.wire.channels import channel
from moiety.wire.service_names import EXPERT_SERVICE
from support.serving import Served
from support.streams import Streams

WITHIN_S = 2.0


async def serving(child: Child) -> bool:
    """Returns what the health service of a process answers."""
    async with channel(child.replica.address) as link:
        request = health_pb2.HealthCheckRequest(service=EXPERT_SERVICE)
        answer = await health_pb2_grpc.HealthStub(link).Check(request, timeout=5)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def until_state(served: Served, child: Child, state: ReplicaState) -> None:
    """Waits until the registry lists `child` in `state`."""
    async with asyncio.timeout(30):
        while not any(
            listed.id == child.replica.id and listed.state is state
            for listed in await served.cluster.registry.replicas()
        ):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("fault", ["raise", "nan", "hang"])
def test_one_of_two_holders_is_sick(served: Served, expected: list[list[int]], fault: str) -> None:
    """The streams go on with the same tokens; the replica is SICK and NOT_SERVING, and recovers once the fault is cleared."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(2, 1)
        await assert_serves_on(client, expected)
        sick = served.cluster.experts(0)[0]
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        await served.cluster.set_fault(sick, fault)
        try:
            assert await streams.finish() == expected
            assert await Streams(client, NEW_TOKENS).finish() == expected
            await until_state(served, sick, ReplicaState.SICK)
            assert not await serving(sick)
        finally:
            await served.cluster.set_fault(sick, "")
        await until_state(served, sick, ReplicaState.READY)
        assert await serving(sick)
        await assert_serves_on(client, expected)
        print(f"worst token gap, one of two devices: {fault}: {streams.worst_gap:.3f} s")
        assert streams.worst_gap <= WITHIN_S

    served.run(scenario)


def test_a_sick_only_holder_is_named_and_recovers(served: Served, expected: list[list[int]]) -> None:
    """Requests that need the only holder, which fails, end with an error that names it; once it is well, they succeed."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        sick = served.cluster.experts(0)[0]
        await served.cluster.set_fault(sick, "raise")
        try:
            with pytest.raises(MoietyError, match=sick.replica.id):
                await Streams(client, NEW_TOKENS).finish()
            await until_state(served, sick, ReplicaState.SICK)
        finally:
            await served.cluster.set_fault(sick, "")
        await until_state(served, sick, ReplicaState.READY)
        await assert_serves_on(client, expected)

    served.run(scenario)


def test_what_is_no_fault_is_refused_by_the_replica(served: Served) -> None:
    """A wrong text, and a process that has no device, are refused with the reason, and nothing changes."""

    async def scenario(_client: Client) -> None:
        with pytest.raises(FailedPrecondition, match="must be raise, nan, hang or slow SECONDS"):
            await served.cluster.set_fault(served.cluster.experts(0)[0], "explode")
        with pytest.raises(FailedPrecondition, match="a router has no live settings"):
            await served.cluster.set_fault(served.cluster.router(), "nan")

    served.run(scenario)
