"""What a fault is: how it is caused, which system it is done to, and what must hold while it lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import grpc

from moiety.core.replica import Replica, Role
from moiety.core.system import SystemId
from moiety.errors import FailedPrecondition
from moiety.internal.v1.experts_pb2 import DescribeReplicaRequest, DescribeReplicaResponse
from moiety.internal.v1.experts_pb2_grpc import ExpertServiceStub
from moiety.registry.interface import Registry
from moiety.tools.chaos.redis_server import RedisServer
from moiety.tools.chaos.relay import Relay
from moiety.wire import status
from moiety.wire.channels import channel

DESCRIBE_S = 10.0


class DidNotHold(Exception):
    """Something that a fault's kind promises did not hold; the message says what."""


class System(Protocol):
    """A running system, as faults and meters see it."""

    folder: Path  # where its services keep logs and caches; on a small file system of its own where that is possible
    redis: RedisServer
    redis_relay: Relay | None  # through which services reach Redis, where that is so

    @property
    def address(self) -> str:
        """The address of a gateway."""
        ...

    @property
    def registry(self) -> Registry: ...

    @property
    def system(self) -> SystemId:
        """The identity of its services."""
        ...

    def replicas(self, role: Role) -> Sequence[Replica]:
        """Returns the live services of one kind, with their process ids."""
        ...

    def relay(self, replica: Replica) -> Relay:
        """Returns the relay through which others reach `replica`. Raises FailedPrecondition if there is none."""
        ...

    async def set_fault(self, replica: Replica, fault: str) -> None:
        """Makes the device of an expert replica faulty; "" clears it. Raises FailedPrecondition where that is not possible."""
        ...

    async def add_expert(self, prefix: Sequence[str], **settings: Any) -> Replica:
        """Starts a replica of the first group whose command begins with `prefix`. Raises FailedPrecondition as above."""
        ...

    async def remove(self, replica: Replica) -> None:
        """Kills a replica that `add_expert` started."""
        ...

    async def repair(self) -> None:
        """Waits until the system is as large as at its start, and every service reaches the others; else Unavailable."""
        ...


Fault = AbstractAsyncContextManager[str]  # entering causes it and says what was done, leaving takes it back


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. With two live holders of each expert and two routers, no request may fail and no token change.

    `cause(system, random)` makes the fault; `random` chooses the victim. Leaving the fault may raise DidNotHold.
    """

    name: str  # FAMILY-WHAT
    does: str
    holds: str
    bound_s: float  # longest time that a stream may wait for its next token
    cause: Callable[[System, Random], Fault]
    lasts_s: float = 4.0
    on_ray: bool = True
    may_break: bool = False  # requests may end with UNAVAILABLE, within `bound_s`: their only gateway is gone

    @property
    def family(self) -> str:
        return self.name.partition("-")[0]


def one_of(system: System, role: Role, random: Random) -> Replica:
    """Returns a live replica of `role`, chosen by `random`."""
    replicas = sorted(system.replicas(role), key=lambda replica: replica.id)
    if not replicas:
        raise FailedPrecondition(f"there is no {role}")
    return random.choice(replicas)


async def described(replica: Replica) -> DescribeReplicaResponse:
    """Returns what an expert replica says of itself. Raises the MoietyError of a failed call."""
    async with channel(replica.address) as link:
        try:
            return await ExpertServiceStub(link).DescribeReplica(DescribeReplicaRequest(), timeout=DESCRIBE_S)
        except grpc.RpcError as error:
            raise status.error_of(error) from None
