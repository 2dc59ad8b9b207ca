"""moiety.internal.v1.ExpertService over loopback: the real service on a real server, called as a router calls it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
import torch
from expert_support import SHAPE, MakeRuntime, plainly, rows_for, weights_of
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moiety.core.experts import ExpertSet
from moiety.core.replica import WIRE_VERSION
from moiety.errors import PeerLost
from moiety.expert.runtime import Runtime
from moiety.expert.service import ExpertService
from moiety.internal.v1 import experts_pb2, experts_pb2_grpc
from moiety.telemetry.tracing import NO_TRACER
from moiety.testing import HOST, SYSTEM, Caller, eventually, open_caller
from moiety.wire import codec
from moiety.wire.channels import channel
from moiety.wire.rows import RowBuffer
from moiety.wire.server import Server
from moiety.wire.service_names import EXPERT_SERVICE
from moiety.wire.transports.connection import Reply
from moiety_kernels import ExpertWeights

HELD = ExpertSet.uniform(3, range(4))


@dataclass(slots=True)
class Served:
    """A running service and one open link to it."""

    service: ExpertService
    server: Server
    address: str
    caller: Caller

    def send(self, wanted: list[int], **changes: object) -> asyncio.Future[Reply | PeerLost]:
        """Sends one row per expert of layer 0, with `changes` to the header."""
        fields = {
            "call_id": 1,
            "system_key": SYSTEM.key,
            "rows": len(wanted),
            "k_offsets": codec.int32_bytes(np.arange(len(wanted) + 1)),
            "experts": codec.int32_bytes(np.array(wanted)),
            "dtype": "float32",
            **changes,
        }
        header = experts_pb2.ForwardRequest(**fields)
        return self.caller.send(header, RowBuffer.of(rows_for(len(wanted))))


@asynccontextmanager
async def served(runtime: Runtime) -> AsyncIterator[Served]:
    """The service over `runtime` and a link to it, for at most 20 s."""
    service = ExpertService(runtime, SHAPE, "tiny", SYSTEM, torch.float32, NO_TRACER)
    server = Server([service.handler()], [EXPERT_SERVICE])
    address = f"{HOST}:{await server.start(HOST, 0)}"
    try:
        async with asyncio.timeout(20), open_caller(address) as caller:
            yield Served(service, server, address, caller)
    finally:
        await server.stop(0)


def tensor_of(reply: Reply) -> torch.Tensor:
    """Returns the rows of a reply."""
    return torch.frombuffer(bytearray(reply.payload), dtype=torch.float32).view(-1, SHAPE.mlp.hidden)


async def test_rows_come_back_in_the_order_asked_for(make_runtime: MakeRuntime):
    """A reply has the call's ids, its rows in the order of its experts, and the measurements."""
    async with served(make_runtime(HELD)) as it:
        reply = await it.send([3, 0, 3], call_id=42, attempt=5)
        assert isinstance(reply, Reply)
        header = reply.header
        assert (header.call_id, header.attempt) == (42, 5)
        assert header.outcome == experts_pb2.OUTCOME_OK
        assert (header.rows, header.activated_experts, header.batch_rows) == (3, 2, 3)
        assert header.compute_ms > 0
        torch.testing.assert_close(tensor_of(reply), plainly([3, 0, 3], rows_for(3)))


@pytest.mark.parametrize(
    ("changes", "outcome", "said"),
    [
        ({"experts": codec.int32_bytes(np.array([0, 5]))}, experts_pb2.OUTCOME_NOT_HELD, "expert(s) [5]"),
        ({"layer": 3}, experts_pb2.OUTCOME_INVALID, "layer = 3: must be below 3"),
        ({"system_key": "other"}, experts_pb2.OUTCOME_WRONG_SYSTEM, f"for system other, not for {SYSTEM}"),
        ({"system_key": ""}, experts_pb2.OUTCOME_WRONG_SYSTEM, "for system (none)"),
        ({"dtype": "float16"}, experts_pb2.OUTCOME_INVALID, "dtype = 'float16': must be float32"),
        ({"k_offsets": codec.int32_bytes(np.array([0, 3, 2]))}, experts_pb2.OUTCOME_INVALID, "k_offsets"),
        ({"rows": 3}, experts_pb2.OUTCOME_INVALID, "k_offsets = '12 bytes': must be 16 bytes"),
    ],
    ids=["one expert not held", "no such layer", "system", "no system", "dtype", "k_offsets", "rows"],
)
async def test_a_refusal_names_its_reason_and_ends_no_other_call(make_runtime: MakeRuntime, changes, outcome, said):
    """A refused call gets its outcome, a reason and no rows; the next call on the stream is answered."""
    async with served(make_runtime(HELD)) as it:
        refused = await it.send([0, 1], **changes)
        assert refused.header.outcome == outcome
        assert said in refused.header.detail
        assert (refused.header.rows, len(refused.payload)) == (0, 0)
        assert (await it.send([0])).header.outcome == experts_pb2.OUTCOME_OK


async def test_garbage_on_the_stream_is_answered_and_survived(make_runtime: MakeRuntime):
    """An unreadable frame gets OUTCOME_INVALID, and the same stream serves the next call."""
    async with served(make_runtime(HELD)) as it, channel(it.address) as link:
        call = link.stream_stream(f"/{EXPERT_SERVICE}/Forward")()
        await call.write(b"\xff\xff garbage")
        header, _ = codec.decode(experts_pb2.ForwardResponse, await call.read())
        assert header.outcome == experts_pb2.OUTCOME_INVALID
        assert "ForwardRequest" in header.detail
        good = experts_pb2.ForwardRequest(call_id=3, system_key=SYSTEM.key, dtype="float32", k_offsets=bytes(4))
        await call.write(good.SerializeToString())
        header, _ = codec.decode(experts_pb2.ForwardResponse, await call.read())
        assert (header.call_id, header.outcome) == (3, experts_pb2.OUTCOME_OK)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_a_client_without_our_codec_is_served(make_runtime: MakeRuntime):
    """The generated stub, which does not set payload_bytes, gets the same rows."""
    async with served(make_runtime(HELD)) as it, channel(it.address) as link:
        request = experts_pb2.ForwardRequest(
            call_id=1,
            system_key=SYSTEM.key,
            rows=1,
            k_offsets=codec.int32_bytes(np.array([0, 1])),
            experts=codec.int32_bytes(np.array([2])),
            dtype="float32",
            payload=rows_for(1).numpy().tobytes(),
        )
        replies = experts_pb2_grpc.ExpertServiceStub(link).Forward(iter([request]))
        reply = await replies.read()
        got = torch.frombuffer(bytearray(reply.payload), dtype=torch.float32)[None]
        torch.testing.assert_close(got, plainly([2], rows_for(1)))


async def test_a_full_replica_says_overloaded(make_runtime: MakeRuntime):
    """A call beyond queue_calls gets OVERLOADED at once; accepted calls are answered later."""
    runtime = make_runtime(HELD, start=False, queue_calls=2)
    async with served(runtime) as it:
        accepted = [it.send([0], call_id=1), it.send([0], call_id=2)]
        refused = await it.send([0], call_id=3)
        assert refused.header.outcome == experts_pb2.OUTCOME_OVERLOADED
        assert "2 of at most 2 calls" in refused.header.detail
        runtime.start()
        for answer in accepted:
            assert (await answer).header.outcome == experts_pb2.OUTCOME_OK


async def test_a_late_call_says_expired(make_runtime: MakeRuntime):
    """A call whose deadline passed before the device was free gets EXPIRED and is not computed."""
    runtime = make_runtime(HELD, start=False)
    async with served(runtime) as it:
        late = it.send([0], deadline_ms=1)
        await eventually(lambda: not runtime.idle)
        await asyncio.sleep(0.002)
        runtime.start()
        assert (await late).header.outcome == experts_pb2.OUTCOME_EXPIRED


async def test_a_failed_computation_is_reported_and_survived(make_runtime: MakeRuntime):
    """OUTCOME_FAILED carries the reason; the next call is computed."""

    def load(held):
        good = {pair: weights_of(pair) for pair in held}
        broken = {(0, 1): ExpertWeights(torch.ones(3, 5), torch.ones(5, 2))}
        return {pair: broken.get(pair, weights) for pair, weights in good.items()}

    async with served(make_runtime(HELD, load=load)) as it:
        failed = await it.send([1])
        assert failed.header.outcome == experts_pb2.OUTCOME_FAILED
        assert "log says why" in failed.header.detail
        assert (await it.send([0])).header.outcome == experts_pb2.OUTCOME_OK


async def test_describe_follows_the_placement(make_runtime: MakeRuntime):
    """DescribeReplica reports what is served and held, also after a new placement."""
    runtime = make_runtime(HELD)
    async with served(runtime) as it:
        first = it.caller.link.description
        assert (first.model, first.system, first.dtype, first.hidden) == (
            "tiny",
            str(SYSTEM),
            "float32",
            SHAPE.mlp.hidden,
        )
        assert first.wire_version == WIRE_VERSION
        assert (ExpertSet.parse(first.held), first.placement_epoch) == (HELD, 0)
        moved = ExpertSet.parse("0-1:4-5")
        await asyncio.to_thread(runtime.hold, moved, 7)
        second = await it.caller.link.describe(5)
        assert (ExpertSet.parse(second.held), second.placement_epoch) == (moved, 7)
        reply = await it.send([4])
        assert reply.header.outcome == experts_pb2.OUTCOME_OK


async def test_health_and_reflection_know_the_service(make_runtime: MakeRuntime):
    """Health reports SERVING, and reflection lists the service and describes its methods."""
    async with served(make_runtime(HELD)) as it, channel(it.address) as link:
        health = health_pb2_grpc.HealthStub(link)
        for service in ("", EXPERT_SERVICE):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest
        questions = [ask(list_services=""), ask(file_containing_symbol=EXPERT_SERVICE)]
        replies = reflection_pb2_grpc.ServerReflectionStub(link).ServerReflectionInfo(iter(questions))
        listed = await replies.read()
        assert EXPERT_SERVICE in {service.name for service in listed.list_services_response.service}
        described = (await replies.read()).file_descriptor_response.file_descriptor_proto
        files = [FileDescriptorProto.FromString(data) for data in described]
        assert "Forward" in {method.name for file in files for service in file.service for method in service.method}


async def test_a_router_that_leaves_is_forgotten(make_runtime: MakeRuntime):
    """After a router's stream breaks, its open calls do no harm and other routers are still served."""
    runtime = make_runtime(HELD, start=False)
    async with served(runtime) as it:
        async with open_caller(it.address) as left:
            await eventually(lambda: it.service.open_streams == 2)
            header = experts_pb2.ForwardRequest(
                call_id=8, system_key=SYSTEM.key, rows=0, k_offsets=bytes(4), dtype="float32"
            )
            answer = left.send(header, RowBuffer.of(rows_for(0)))
            await eventually(lambda: not runtime.idle)
        assert isinstance(await answer, PeerLost)
        await eventually(lambda: it.service.open_streams == 1)
        runtime.start()
        assert (await it.send([0])).header.outcome == experts_pb2.OUTCOME_OK
        await eventually(lambda: runtime.idle)
