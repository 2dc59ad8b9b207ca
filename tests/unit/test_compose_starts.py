"""Services that cannot start, or are not ready, say why in one line."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moiety import compose
from moiety.core.replica import ReplicaState, Role
from moiety.core.system import SystemId
from moiety.errors import CheckpointError, ConfigError, Unavailable
from moiety.internal.v1 import experts_pb2
from moiety.registry.file import FileRegistryWriter
from moiety.testing import HOST, SYSTEM, FakeGateway, eventually, open_caller
from moiety.wire import codec
from moiety.wire.channels import channel
from moiety.wire.rows import RowBuffer
from moiety.wire.service_names import EXPERT_SERVICE


def settings(role: Role, model: str, folder: Path, **more: object) -> compose.ServiceSettings:
    """Settings of a service whose registry is a file in `folder`."""
    return compose.settings_of(role, {"model": model, "registry": f"file://{folder / 'registry.json'}", **more})


async def test_a_gateway_and_a_command_refuse_the_port_of_another_system(tiny: Callable[[str], str], tmp_path: Path):
    """Both name who listens: a gateway that starts there, and `moiety serve` before it starts Ray."""
    async with FakeGateway(SYSTEM) as other:
        said = f"{HOST}:{other.port} serves model fake of another system, {SYSTEM}"
        wanted = settings(Role.GATEWAY, tiny("mixtral"), tmp_path, port=other.port)
        with pytest.raises(ConfigError, match=said):
            await compose.start(wanted, replica_id="g", node="here")
        command = [sys.executable, "-m", "moiety.cli.main", "serve", tiny("mixtral"), "--grpc-port", str(other.port)]
        served = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
        )
        assert (served.returncode, said in served.stderr, "Ray" in served.stderr) == (1, True, False)


async def test_gateways_of_one_system_share_both_ports(tiny: Callable[[str], str], tmp_path: Path):
    """Two gateways serve on the same two ports; a third of another system is refused; at the end both ports are free."""
    FileRegistryWriter(tmp_path / "registry.json")
    ports = {"port": _free_port(), "http_port": _free_port()}
    wanted = settings(Role.GATEWAY, tiny("mixtral"), tmp_path, **ports)
    before = asyncio.all_tasks()
    gateways = [await compose.start(wanted, replica_id=name, node="here") for name in ("one", "two")]
    try:
        addresses = {(gateway.replica.address, gateway.replica.http_address) for gateway in gateways}
        assert addresses == {(f"{HOST}:{ports['port']}", f"{HOST}:{ports['http_port']}")}
        other = settings(
            Role.GATEWAY, tiny("mixtral"), tmp_path, app="other", port=_free_port(), http_port=ports["http_port"]
        )
        with pytest.raises(
            ConfigError, match=f"gateway.http_port = {ports['http_port']}: .* of another system, moiety"
        ):
            await compose.start(other, replica_id="three", node="here")
        await gateways.pop(0).close()
        assert await asyncio.to_thread(_status, f"http://{HOST}:{ports['http_port']}/healthz") == 200
    finally:
        for gateway in gateways:
            await gateway.drain(5.0, ending=True)
            await gateway.close()
    for port in ports.values():
        with socket.create_server((HOST, port)):
            pass
    await eventually(lambda: asyncio.all_tasks() == before)


async def test_a_gateway_without_http(tiny: Callable[[str], str], tmp_path: Path):
    """With the setting off, a gateway serves gRPC alone, and a port that others use does not matter."""
    FileRegistryWriter(tmp_path / "registry.json")
    with socket.create_server((HOST, 0)) as taken:
        wanted = settings(Role.GATEWAY, tiny("mixtral"), tmp_path, port=0, http=False, http_port=taken.getsockname()[1])
        gateway = await compose.start(wanted, replica_id="g", node="here")
        await gateway.close()
    assert gateway.replica.http_address == ""


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        port: int = free.getsockname()[1]
        return port


def _status(url: str) -> int:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return int(answer.status)


async def test_a_service_refuses_another_checkpoint_than_was_deployed(tiny: Callable[[str], str], tmp_path: Path):
    """A node whose folder holds another model than the application was deployed with starts no replica."""
    wanted = settings(Role.EXPERT, tiny("mixtral"), tmp_path, held="0:0", revision="0" * 32)
    with pytest.raises(CheckpointError, match=f"but this system serves revision {'0' * 32}"):
        await compose.start(wanted, replica_id="e", node="here")


async def test_a_router_that_waits_for_experts_says_so(
    tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """While experts have no holder, a router is STARTING and logs how many, with an example."""
    monkeypatch.setattr("moiety.compose.router.MISSING_NOTICE_S", 0.1)
    FileRegistryWriter(tmp_path / "registry.json")
    wanted = settings(Role.ROUTER, tiny("mixtral"), tmp_path, dtype="float32", kv_memory=16 << 20, threads=1)
    running = await compose.start(wanted, replica_id="r", node="here")
    try:
        assert running.replica.state is ReplicaState.STARTING
        await eventually(lambda: "not ready: no replica holds" in caplog.text)
        assert "such as expert 0 of layer 0" in caplog.text
    finally:
        await running.close()


async def test_a_replica_with_a_sick_device_says_so_everywhere(
    tiny: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """It is SICK in the registry, NOT_SERVING, and fails Serve's check, with one line in the log; then it recovers."""
    FileRegistryWriter(tmp_path / "registry.json")
    wanted = settings(Role.EXPERT, tiny("mixtral"), tmp_path, held="0:0", dtype="float32")
    running = await compose.start(wanted, replica_id="e", node="here")
    address = running.replica.address

    async def serving() -> bool:
        async with channel(address) as link:
            request = health_pb2.HealthCheckRequest(service=EXPERT_SERVICE)
            answer = await health_pb2_grpc.HealthStub(link).Check(request, timeout=5)
            return answer.status == health_pb2.HealthCheckResponse.SERVING

    try:
        running.healthy()
        await running.reconfigure({"fault": "nan"})
        async with open_caller(address) as caller:
            described = caller.link.description
            request = experts_pb2.ForwardRequest(
                call_id=1,
                system_key=SystemId.parse(described.system).key,
                rows=1,
                k_offsets=codec.int32_bytes(np.array([0, 1])),
                experts=codec.int32_bytes(np.array([0])),
                dtype=described.dtype,
            )
            reply = await caller.send(request, RowBuffer.of(torch.ones(1, described.hidden)))
            assert reply.header.outcome == experts_pb2.OUTCOME_FAILED
        await eventually(lambda: running.replica.state is ReplicaState.SICK)
        with pytest.raises(Unavailable, match="the device is sick"):
            running.healthy()
        assert not await serving()
        await running.reconfigure({})
        await eventually(lambda: running.replica.state is ReplicaState.READY)
        running.healthy()
        assert await serving()
        said = [record.message for record in caplog.records if "sick" in record.message or "well" in record.message]
        assert [line.split(":")[0] for line in said] == ["e is sick", "e is well again"]
    finally:
        await running.close()
