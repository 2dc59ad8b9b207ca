"""What a client can rely on: seeds, cancellation, deadlines and usage; and what operators see: ledger and health."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moiety.client import Client
from moiety.core.sampling import FinishReason
from moiety.errors import DeadlineExceeded
from moiety.internal.v1 import engine_pb2, engine_pb2_grpc
from moiety.wire.channels import channel
from support.serving import Served
from support.streams import PROMPTS, Streams

WAIT_S = 20.0
NEW_TOKENS = 16


async def _sampled(client: Client, seed: int) -> list[int]:
    stream = client.generate([9, 8, 7], max_tokens=NEW_TOKENS, temperature=0.9, top_p=0.95, seed=seed, ignore_eos=True)
    return [token async for chunk in stream for token in chunk.token_ids]


async def _load(served: Served) -> tuple[int, int]:
    """Returns the (running, waiting) requests of all routers; earlier tests may have left two."""
    running = waiting = 0
    for router in served.cluster.replicas("router"):
        async with channel(router.replica.address) as link:
            stub = engine_pb2_grpc.EngineServiceStub(link)
            description = await stub.DescribeEngine(engine_pb2.DescribeEngineRequest())
            running, waiting = running + description.running, waiting + description.waiting
    return running, waiting


def test_a_seed_decides_the_tokens_in_any_batch(served: Served) -> None:
    """The same seed gives the same tokens alone and in a full batch; another seed gives other tokens."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        alone = await _sampled(client, 5)
        crowd = Streams(client, NEW_TOKENS)
        assert await _sampled(client, 5) == alone
        await crowd.finish()
        assert await _sampled(client, 6) != alone

    served.run(scenario)


def test_usage_and_finish_reason_come_last(served: Served) -> None:
    """Only the last message has the finish reason and the usage; only the first has the request id."""

    async def scenario(client: Client) -> None:
        chunks = [chunk async for chunk in client.generate([5, 6], max_tokens=3, ignore_eos=True, request_id="mine")]
        assert [chunk.finish_reason for chunk in chunks] == [None, None, FinishReason.LENGTH]
        assert (chunks[-1].prompt_tokens, chunks[-1].completion_tokens) == (2, 3)
        assert [chunk.request_id for chunk in chunks] == ["mine", "", ""]

    served.run(scenario)


def test_closing_the_stream_frees_the_slot(served: Served) -> None:
    """A stream closed after its first tokens leaves no request running or waiting."""

    async def scenario(client: Client) -> None:
        stream = client.generate([5, 6, 7], max_tokens=500, ignore_eos=True)
        async for _ in stream:
            break
        assert (await _load(served))[0] == 1
        await stream.aclose()
        async with asyncio.timeout(WAIT_S):
            while await _load(served) != (0, 0):
                await asyncio.sleep(0.02)

    served.run(scenario)


def test_a_deadline_ends_the_request_with_its_own_status(served: Served) -> None:
    """A request that passes its deadline ends with DEADLINE_EXCEEDED and frees its slot."""

    async def scenario(client: Client) -> None:
        with pytest.raises(DeadlineExceeded):
            async for _ in client.generate([5, 6, 7], max_tokens=450, ignore_eos=True, timeout_s=0.5):
                pass
        async with asyncio.timeout(WAIT_S):
            while await _load(served) != (0, 0):
                await asyncio.sleep(0.02)

    served.run(scenario)


def test_the_ledger_counts_every_row(served: Served) -> None:
    """Expert demand in Redis grows by exactly tokens x top-k in each layer: rows are counted, not sampled."""

    async def rows_by_layer() -> list[int]:
        registry = served.cluster.registry
        live = {router.id for router in await registry.routers()}  # counters of a lost router expire at some time
        demands = [demand for writer, demand in (await registry.expert_demand()).items() if writer in live]
        return [sum(sum(d.rows[layer]) for d in demands) for layer in range(served.cluster.shape.moe_layers)]

    async def settled() -> list[int]:
        """Returns the totals once a whole reporting period has not changed them."""
        last = await rows_by_layer()
        while True:
            await asyncio.sleep(1.2)
            if (now := await rows_by_layer()) == last:
                return now
            last = now

    prompts = [[token + 1 for token in prompt] for prompt in PROMPTS]  # no other test's, so the prefix cache has none

    async def scenario(client: Client) -> None:
        async with asyncio.timeout(60):
            before = await settled()
            await Streams(client, NEW_TOKENS, prompts).finish()
            after = await settled()
        tokens = sum(map(len, prompts)) + len(prompts) * (NEW_TOKENS - 1)  # the model never runs the last token
        grown = [new - old for new, old in zip(after, before, strict=True)]
        assert grown == [tokens * served.cluster.shape.top_k] * served.cluster.shape.moe_layers

    served.run(scenario)


def test_every_service_answers_health_checks(served: Served) -> None:
    """grpc.health.v1 reports SERVING on every service, and fails for a service name that does not exist."""

    async def scenario(_: Client) -> None:
        for child in served.cluster.children:
            async with channel(child.replica.address) as link:
                stub = health_pb2_grpc.HealthStub(link)
                response = await stub.Check(health_pb2.HealthCheckRequest(service=""))
                assert response.status == health_pb2.HealthCheckResponse.SERVING
                with pytest.raises(grpc.RpcError):
                    await stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))

    served.run(scenario)
