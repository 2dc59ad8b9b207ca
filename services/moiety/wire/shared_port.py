"""Lets gateways of one system share a port, and nobody else: whoever listens there is asked first."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from moiety.core.system import SystemId
from moiety.errors import ConfigError
from moiety.internal.v1.gateway_pb2 import DescribeGatewayRequest, DescribeGatewayResponse
from moiety.internal.v1.gateway_pb2_grpc import GatewayServiceStub
from moiety.wire.channels import channel

ANSWER_S = 2.0
HANDOVER_S = 20.0  # while an application changes its model or groups, its old gateway still listens for a while
RETRY_S = 0.1
LOCK_S = 10.0
_REACHABLE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # every interface -> an address that reaches it


async def check_port(host: str, port: int, system: SystemId | None) -> None:
    """Returns once no service listens at `host`:`port` that is not a gateway of `system`. Port 0 is always free.

    Waits up to HANDOVER_S for an earlier system of the same application and cluster. Raises ConfigError, naming who
    listens, for everybody else. `system` None: a system that does not run anywhere yet.
    """
    deadline = asyncio.get_running_loop().time() + HANDOVER_S
    while port and _occupied(host, port):
        owner = await _owner(host, port)
        if owner is None:
            raise ConfigError(
                "gateway.port", port, f"another program listens at {host}:{port}: stop it, or set another port"
            )
        if system is not None and owner.system == str(system):
            return
        if not _succeeds(system, owner.system) or asyncio.get_running_loop().time() > deadline:
            served = f"{host}:{port} serves model {owner.model} of another system, {owner.system}"
            raise ConfigError("gateway.port", port, f"{served}: stop it, or set another port")
        await asyncio.sleep(RETRY_S)


@asynccontextmanager
async def port_lock(port: int) -> AsyncIterator[None]:
    """Between looking who listens at a port and listening there, no other gateway of this machine does the same.

    Linux only: the lock is a socket name, which the kernel frees when its process ends. After LOCK_S the block runs without it.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        deadline = asyncio.get_running_loop().time() + LOCK_S
        while port and sys.platform == "linux" and asyncio.get_running_loop().time() < deadline:
            try:
                lock.bind(f"\0moiety-gateway-port-{port}")
                break
            except OSError:
                await asyncio.sleep(RETRY_S)
        yield


def _occupied(host: str, port: int) -> bool:
    """Whether a socket listens at the address, or at one that includes it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


async def _owner(host: str, port: int) -> DescribeGatewayResponse | None:
    """Asks who listens; None if it is no gateway, or does not answer."""
    address = _REACHABLE.get(host, host)
    async with channel(f"[{address}]:{port}" if ":" in address else f"{address}:{port}") as link:
        try:
            answer: DescribeGatewayResponse = await GatewayServiceStub(link).DescribeGateway(
                DescribeGatewayRequest(), timeout=ANSWER_S
            )
        except grpc.RpcError:
            return None
    return answer


def _succeeds(system: SystemId | None, earlier: str) -> bool:
    """Whether `system` takes the place of `earlier`: the same application of the same cluster, with another model or groups."""
    try:
        before = SystemId.parse(earlier)
    except ValueError:
        return False
    return system is not None and (before.app, before.cluster) == (system.app, system.cluster)
