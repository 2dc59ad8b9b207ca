"""A system whose services listen on ::1 alone."""

from __future__ import annotations

import json
import socket
import urllib.request
from asyncio import to_thread
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from moiety import compose
from moiety.client import Client
from moiety.config.services import GatewaySettings
from moiety.config.validate import validated
from moiety.core.address import split
from moiety.core.replica import Role
from moiety.errors import ConfigError, DeadlineExceeded
from moiety.registry.embedded_redis import EmbeddedRedis
from moiety.registry.file import FileRegistryWriter
from moiety.wire.shared_port import check_ports

IPV6 = "::1"


def _has_ipv6() -> bool:
    try:
        with socket.create_server((IPV6, 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not _has_ipv6(), reason=f"this machine has no {IPV6}")
async def test_a_gateway_on_ipv6(tiny: Callable[[str], str], tmp_path: Path):
    """It registers with brackets, both doors answer, and another system's gateway finds its ports taken."""
    FileRegistryWriter(tmp_path / "registry.json")
    common = {"model": tiny("mixtral"), "registry": f"file://{tmp_path / 'registry.json'}", "listen_host": f"[{IPV6}]"}
    async with AsyncExitStack() as ends:
        wanted = compose.settings_of(Role.GATEWAY, {**common, "port": 0, "http_port": 0})
        gateway = await compose.start(wanted, replica_id="gateway", node="here")
        ends.push_async_callback(gateway.close)
        host, port = split(gateway.replica.address)
        assert (host, gateway.replica.address) == (IPV6, f"[{IPV6}]:{port}")
        async with Client(gateway.replica.address) as client:
            with pytest.raises(DeadlineExceeded, match=rf"gateway \[{IPV6}\]:{port}: ListModels was not done within"):
                await client.models(timeout_s=0.5)  # there is no router
        answer = await to_thread(_get, f"http://{gateway.replica.http_address}/healthz")
        assert json.loads(answer) == {"status": "ok"}
        taken = validated(GatewaySettings, {**common, "port": port, "http_port": 0, "app": "other"})
        with pytest.raises(ConfigError, match=rf"gateway\.port = {port}: \[{IPV6}\]:{port} serves model"):
            await check_ports(taken, taken.system)


@pytest.mark.skipif(not _has_ipv6(), reason=f"this machine has no {IPV6}")
async def test_a_system_on_ipv6(tiny: Callable[[str], str]):
    """A router finds expert replicas on ::1, and a gateway the router: tokens stream through all three."""
    of_role: Mapping[Role, Mapping[str, Any]] = {
        Role.EXPERT: {"held": "0-3:0-7"},
        Role.ROUTER: {"threads": 1, "kv_memory": "64MiB", "transport": "grpc"},
        Role.GATEWAY: {"port": 0, "http_port": 0},
    }
    async with AsyncExitStack() as ends:
        redis = ends.enter_context(EmbeddedRedis())
        common = {"model": tiny("mixtral"), "registry": redis.url, "listen_host": IPV6, "groups": 1}
        for role, more in of_role.items():
            service = await compose.start(compose.settings_of(role, {**common, **more}), replica_id=role, node="here")
            ends.push_async_callback(service.close)
        async with Client(service.replica.address) as client:
            chunks = [chunk async for chunk in client.generate([5, 6, 7], max_tokens=3, ignore_eos=True, timeout_s=30)]
    assert sum(len(chunk.token_ids) for chunk in chunks) == 3


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body
