"""Measures what a gateway's process spends on each streamed token, through gRPC and through HTTP.

    python tests/bench/door_cost.py                # both doors in turns, and their ratio
    python tests/bench/door_cost.py --door grpc    # runs in an older checkout, too, for a comparison

A gateway runs in a process of its own, in front of one fake engine, which sends a token of all streams together as a router
does. Printed is the gateway's processor time, less what it takes when idle, so other load on the machine matters little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from moiety.compose import settings_of
from moiety.core.experts import ModelShape
from moiety.core.replica import Role
from moiety.local.child_process import read, write
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.revision import revision_of
from moiety.registry.entries import replica_from_json
from moiety.registry.file import FileRegistryWriter
from moiety.synthetic import write_tiny
from moiety.testing import HOST, FakeEngine, fake_shape
from moiety.v1 import generation_pb2

PROMPT = list(range(5, 21))
STEP_S = 0.05
SHAPE = fake_shape(vocabulary=320, max_context=4096)


@dataclass(slots=True)
class Doors:
    """A gateway in a process of its own."""

    pid: int
    grpc: str
    http: str

    def cpu_s(self) -> float:
        """Returns the processor time of the gateway's process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Steps:
    """Lets all streams of a fake engine go on together, every STEP_S."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    async def wait(self, _position: int) -> None:
        await self._next.wait()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            step, self._next = self._next, asyncio.Event()
            step.set()


@asynccontextmanager
async def gateway(shape: ModelShape, http: bool) -> AsyncIterator[Doors]:
    """A gateway over one fake engine."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny("qwen3_moe", Path(folder) / "model"))
        registry = FileRegistryWriter(Path(folder) / "registry.json")
        values = {
            "model": model,
            "registry": f"file://{folder}/registry.json",
            "app": "bench",
            "cluster": "bench",
            "groups": 1,
            "revision": revision_of(Checkpoint.open(model)),
            "deployment": "gateway",
            "port": 0,
            "max_concurrent": 4096,
        }
        if http:
            with socket.create_server((HOST, 0)) as probe:
                values["http_port"] = probe.getsockname()[1]
        settings = settings_of(Role.GATEWAY, values)
        steps = Steps()
        engine = FakeEngine("router", shape, system=settings.system, slots=4096)
        engine.before_token = steps.wait
        await engine.start(registry)
        stepping = asyncio.create_task(steps.run())
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "moiety.local.child", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            await write(child, {"role": "gateway", "settings": values, "replica_id": "gateway"})
            answer = await read(child)
            if "error" in answer:
                raise SystemExit(answer["error"])
            replica = replica_from_json(json.dumps(answer["replica"]))
            yield Doors(child.pid, replica.address, f"{HOST}:{values.get('http_port', 0)}")
        finally:
            child.stdin.close()
            await child.wait()
            stepping.cancel()
            await engine.vanish()
            await registry.close()


async def grpc_streams(address: str, streams: int, tokens: int) -> None:
    """Reads `streams` streams over gRPC, without parsing their messages."""
    sampling = generation_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True)
    request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT), sampling=sampling)
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream("/moiety.v1.GenerationService/Generate")

        async def one() -> None:
            received = [message async for message in call(request.SerializeToString())]
            assert len(received) == tokens, len(received)

        await asyncio.gather(*(one() for _ in range(streams)))


async def http_streams(address: str, streams: int, tokens: int) -> None:
    """Reads `streams` streams over HTTP, without parsing their events."""
    host, _, port = address.rpartition(":")
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body

    async def one() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        received = await reader.read(-1)
        writer.close()
        # A token that ends within a character has no text yet, and so no event.
        assert tokens // 2 < received.count(b"data: ") <= tokens + 1, received[-500:]
        assert b"data: [DONE]" in received[-100:], received[-500:]

    await asyncio.gather(*(one() for _ in range(streams)))


async def measure(doors: Doors, door: str, streams: int, tokens: int) -> float:
    """Returns the gateway's processor time per token in microseconds."""
    idle_from = doors.cpu_s()
    await asyncio.sleep(2.0)
    idle = (doors.cpu_s() - idle_from) / 2.0
    loop = asyncio.get_running_loop()
    began, used = loop.time(), doors.cpu_s()
    await (grpc_streams(doors.grpc, streams, tokens) if door == "grpc" else http_streams(doors.http, streams, tokens))
    spent = doors.cpu_s() - used - idle * (loop.time() - began)
    return spent / (streams * tokens) * 1e6


async def main() -> None:
    """Measures each door in turns."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--door", choices=("both", "grpc"), default="both")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100, help="per stream")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    names = ("grpc",) if options.door == "grpc" else ("grpc", "http")
    found: dict[str, list[float]] = {name: [] for name in names}
    async with gateway(SHAPE, "http" in names) as doors:
        for name in names:  # warm
            await measure(doors, name, 16, 20)
        for _ in range(options.rounds):
            for name in names:
                found[name].append(await measure(doors, name, options.streams, options.tokens))
    for name, values in found.items():
        print(
            f"{name}: {statistics.median(values):.1f} µs of the gateway per token, "
            f"{min(values):.1f} to {max(values):.1f}, {options.streams} streams"
        )
    if len(names) == 2:
        ratios = [http / rpc for http, rpc in zip(found["http"], found["grpc"], strict=True)]
        print(f"http / grpc: {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    asyncio.run(main())
