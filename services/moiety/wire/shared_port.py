"""Lets gateways of one system share their ports, and no one else: a gateway asks who listens there before it does too."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc

from moiety.config.services import GatewaySettings
from moiety.core.address import joined
from moiety.core.system import SystemId
from moiety.errors import ConfigError
from moiety.internal.v1.gateway_pb2 import DescribeGatewayRequest
from moiety.internal.v1.gateway_pb2_grpc import GatewayServiceStub
from moiety.wire.channels import channel
from moiety.wire.http import identity
from moiety.wire.http.identity import Owner

ANSWER_S = 2.0
TRIES = 2  # a gateway that is just starting or stopping may not answer
HANDOVER_S = 20.0  # while an application changes its model or groups, its old gateway still listens for a while
LOCK_S = 10.0
RETRY_S = 0.1
_REACHABLE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # every interface -> an address that reaches it


async def _ask_over_grpc(address: str, port: int, timeout_s: float) -> Owner | None:
    """Asks who listens; None if it does not answer, or is no gateway."""
    async with channel(joined(address, port)) as link:
        try:
            answer = await GatewayServiceStub(link).DescribeGateway(DescribeGatewayRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return None
    return Owner(answer.model, answer.system)


@dataclass(frozen=True, slots=True)
class Door:
    """One of the ports of a gateway: its setting, and how to ask who listens there."""

    setting: str
    ask: Callable[[str, int, float], Awaitable[Owner | None]]


GRPC = Door("gateway.port", _ask_over_grpc)
HTTP = Door("gateway.http_port", identity.ask)


def ports(settings: GatewaySettings) -> list[tuple[Door, int]]:
    """Returns the ports at which a gateway of `settings` listens; 0 = a free one."""
    return [(GRPC, settings.port), *([(HTTP, settings.http_port)] if settings.http else [])]


async def check_ports(settings: GatewaySettings, system: SystemId | None) -> None:
    """Calls `check_port` for every port of a gateway of `settings`."""
    for door, port in ports(settings):
        await check_port(settings.listen_host, port, system, door=door)


@asynccontextmanager
async def listening_at_all(settings: GatewaySettings, system: SystemId) -> AsyncIterator[None]:
    """Does what `listening` does, for every port of a gateway of `settings`."""
    async with AsyncExitStack() as held:
        for door, port in ports(settings):
            await held.enter_async_context(listening(settings.listen_host, port, system, door))
        yield


@contextmanager
def claimed_ports(settings: GatewaySettings) -> Iterator[None]:
    """Claims the ports of `settings` on this machine until the block ends, though nobody listens there yet.

    `deploy_app` holds the claim from its check of the ports to the system's end, so that two starts at once do not both pass
    the check. Raises ConfigError if another process holds a claim. On other systems than Linux, nothing is claimed.
    """
    with ExitStack() as claims:
        for door, port in ports(settings):
            if port and sys.platform == "linux":
                claim = claims.enter_context(socket.socket(socket.AF_UNIX))
                try:
                    claim.bind(f"\0moiety-system-port-{settings.listen_host}-{port}")
                except OSError:
                    raise _refusal(door, port, "another system is starting there, or stopping") from None
        yield


async def check_port(
    host: str, port: int, system: SystemId | None, handover_s: float = HANDOVER_S, door: Door = GRPC
) -> None:
    """Returns once nobody listens at `host`:`port` but gateways of `system`. Port 0 is always free.

    Waits up to `handover_s` for a gateway of the same application and cluster with another model or groups, which Serve is
    about to end. Raises ConfigError, naming who listens, for everybody else. `system` None: one that runs nowhere yet.
    """
    clock = asyncio.get_running_loop().time
    until, silent = clock() + handover_s, 0
    while port and _occupied(host, port):
        owner = await door.ask(_REACHABLE.get(host, host), port, ANSWER_S)
        if owner is None:
            silent += 1
            if silent >= TRIES and _occupied(host, port):
                raise _refusal(door, port, f"another program listens at {joined(host, port)}")
        elif system is not None and owner.system == str(system):
            return
        elif clock() >= until or not _succeeds(system, owner.system):
            raise _refusal(
                door, port, f"{joined(host, port)} serves model {owner.model} of another system, {owner.system}"
            )
        await asyncio.sleep(RETRY_S)


@asynccontextmanager
async def listening(host: str, port: int, system: SystemId, door: Door = GRPC) -> AsyncIterator[None]:
    """In the block a gateway may begin to listen at `host`:`port`. No other gateway of this machine does so meanwhile.

    Raises ConfigError as `check_port` does, and if the other gateway takes longer than LOCK_S. Without Linux, two gateways
    that start at the same moment may not see each other.
    """
    with socket.socket(socket.AF_UNIX) as lock:  # the kernel frees a name of the abstract namespace with its process
        until = asyncio.get_running_loop().time() + LOCK_S
        while port and sys.platform == "linux":
            try:
                lock.bind(f"\0moiety-gateway-port-{port}")
                break
            except OSError:
                if asyncio.get_running_loop().time() >= until:
                    raise _refusal(door, port, f"another gateway has been starting there for {LOCK_S:g} s") from None
            await asyncio.sleep(RETRY_S)
        await check_port(host, port, system, handover_s=0.0, door=door)
        yield


def _refusal(door: Door, port: int, why: str) -> ConfigError:
    return ConfigError(door.setting, port, f"{why}: stop it, or set another port")


def _occupied(host: str, port: int) -> bool:
    """Whether a socket listens at the address, or at one that includes it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _succeeds(system: SystemId | None, earlier: str) -> bool:
    """Whether `system` takes the place of `earlier`: the same application of the same cluster, with another model or groups."""
    try:
        before = SystemId.parse(earlier)
    except ValueError:
        return False
    return system is not None and (before.app, before.cluster) == (system.app, system.cluster)
