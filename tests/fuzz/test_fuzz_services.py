"""A running system gets noise on every port, method and socket: it stays alive, small and correct."""

from __future__ import annotations

import asyncio
import mmap
import re
import socket
from pathlib import Path
from random import Random

import grpc
import pytest
from fuzz_support import FAST, SLOW, damaged

from moiety.client import Client
from moiety.core.replica import WIRE_VERSION, Role
from moiety.internal.v1 import engine_pb2, experts_pb2
from moiety.internal.v1.experts_pb2_grpc import ExpertServiceStub
from moiety.v1 import generation_pb2
from moiety.wire.channels import channel
from moiety.wire.service_names import ENGINE_SERVICE, EXPERT_SERVICE, GENERATION_SERVICE
from moiety.wire.transports.doorbell import CALL
from moiety.wire.transports.shm_segment import create_segment
from support.serving import Served
from support.streams import Streams

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)  # a client's first bytes, and an empty SETTINGS frame
TOKENS = 12
GROWTH_MIB = 128  # of a process, over all inputs
ANSWER_S = 10.0
# What an RPC with a damaged message may end with.
EXPECTED = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNAVAILABLE", "CANCELLED"}
UNREADABLE = "DecodeError"  # gRPC's own answer, of status UNKNOWN, to a message between services that it cannot parse


def rss_mib(pid: int) -> int:
    """Returns the resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


async def noise_on_tcp(random: Random, address: str, count: int) -> int:
    """Sends damaged HTTP/2 to a port, on connections of their own."""
    host, _, port = address.rpartition(":")
    for _ in range(count):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(damaged(random, PREFACE) + random.randbytes(random.randrange(100)))
        writer.close()
    return count


async def noise_on_method(random: Random, link: grpc.aio.Channel, method: str, valid: bytes, count: int) -> int:
    """Sends damaged messages to an RPC with one response or a stream of them; checks how each ends."""
    for _ in range(count):
        call = link.unary_stream(method)(damaged(random, valid), timeout=ANSWER_S)
        try:
            async for _ in call:
                break
            call.cancel()
        except grpc.aio.AioRpcError as error:
            if error.code().name not in EXPECTED and UNREADABLE not in (error.details() or ""):
                raise AssertionError(f"{method} ended with {error.code().name}: {error.details()}") from error
    return count


async def noise_on_stream(random: Random, link: grpc.aio.Channel, method: str, valid: bytes, count: int) -> int:
    """Sends damaged messages on one stream after another: a stream may end with an error, the next one must open."""
    sent = 0
    while sent < count:
        call = link.stream_stream(method)(timeout=ANSWER_S)
        try:
            for _ in range(20):
                await call.write(damaged(random, valid))
                sent += 1
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            sent += 1
        call.cancel()
    return sent


def noise_on_doorbell(random: Random, name: str, hello: bytes, call: bytes, count: int) -> int:
    """Sends damaged hellos and, after an accepted one, damaged calls whose headers are damaged, too."""
    for number in range(count):
        descriptor, segment = create_segment(1 << 16)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, open(descriptor, "rb", buffering=0):
            sock.settimeout(ANSWER_S)
            sock.connect(f"\0{name}")
            try:
                if number % 2:
                    socket.send_fds(
                        sock, [damaged(random, hello) or b"\0"], [descriptor] if random.random() < 0.8 else []
                    )
                    continue
                socket.send_fds(sock, [hello], [descriptor])
                assert experts_pb2.SharedMemoryWelcome.FromString(sock.recv(8192)).accepted
                _ring(random, sock, segment, call)
            except (ConnectionError, BrokenPipeError):
                pass  # it hung up: that is its answer to nonsense
    return count


def _ring(random: Random, sock: socket.socket, segment: mmap.mmap, call: bytes) -> None:
    for _ in range(3):
        header = damaged(random, call)
        segment[1024 : 1024 + len(header)] = header
        ring = CALL.pack(0, random.choice((0, 128, 512)), random.choice((0, 256, 512)), len(header))
        sock.send(damaged(random, ring) or b"\0" if random.random() < 0.5 else ring)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "times", [pytest.param(FAST, id="fast"), pytest.param(SLOW, id="slow", marks=pytest.mark.slow)]
)
def test_noise_harms_no_service(served: Served, times: int) -> None:
    """After thousands of damaged inputs every process lives, has its memory, and streams give the same tokens."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        await served.scale_routers(1)
        expected = await Streams(client, TOKENS).finish()
        pids = {child.replica.id: child.pid for child in served.cluster.children}
        before = {name: rss_mib(pid) for name, pid in pids.items()}
        random, tried = Random(14), 0
        expert = served.cluster.experts(0)[0].replica
        async with channel(expert.address) as link:
            description = await ExpertServiceStub(link).DescribeReplica(experts_pb2.DescribeReplicaRequest())
            key = served.cluster.system.key
            call = experts_pb2.ForwardRequest(
                call_id=1,
                system_key=key,
                rows=1,
                dtype=description.dtype,
                k_offsets=bytes(4) + b"\1\0\0\0",
                experts=bytes(4),
            ).SerializeToString()
            tried += await noise_on_stream(random, link, f"/{EXPERT_SERVICE}/Forward", call, 1500 * times)
            tried += await noise_on_method(random, link, f"/{EXPERT_SERVICE}/DescribeReplica", b"", 200 * times)
        hello = experts_pb2.SharedMemoryHello(
            wire_version=WIRE_VERSION, system=description.system, dtype=description.dtype
        ).SerializeToString()
        name = description.shared_memory
        tried += await asyncio.to_thread(noise_on_doorbell, random, name, hello, call, 200 * times)
        request = generation_pb2.GenerateRequest(sampling=generation_pb2.SamplingParams(max_tokens=2, temperature=0.5))
        request.token_ids.ids.extend([5, 6, 7])
        async with channel(served.cluster.address) as link:
            asked = request.SerializeToString()
            tried += await noise_on_method(random, link, f"/{GENERATION_SERVICE}/Generate", asked, 200 * times)
        engine_request = engine_pb2.EngineRequest(
            request_id="fuzz",
            system_key=key,
            prompt_ids=[5, 6, 7],
            sampling=generation_pb2.SamplingParams(max_tokens=2, n=1),
        )
        message = engine_pb2.GenerateTokensRequest(call_id=3, request=engine_request).SerializeToString()
        async with channel(served.cluster.router().replica.address) as link:
            tried += await noise_on_stream(random, link, f"/{ENGINE_SERVICE}/GenerateTokens", message, 400 * times)
        for child in served.cluster.children:
            tried += await noise_on_tcp(random, child.replica.address, 60 * times)
        after = {child.replica.id: child.pid for child in served.cluster.children}
        assert after == pids, "every process lives"
        assert await Streams(client, TOKENS).finish() == expected
        growth = {name: rss_mib(pid) - before[name] for name, pid in pids.items()}
        print(f"fuzzed {len({*Role})} kinds of services with {tried} inputs; memory grew by {growth} MiB")
        assert max(growth.values()) <= GROWTH_MIB

    served.run(scenario)
