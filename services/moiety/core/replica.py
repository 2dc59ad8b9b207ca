"""A live service as the registry knows it, and the placement of experts on deployments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from moiety.core.experts import ExpertSet

WIRE_VERSION = 1


class Role(StrEnum):
    """What a service is."""

    EXPERT = "expert"
    ROUTER = "router"
    GATEWAY = "gateway"


class ReplicaState(StrEnum):
    """Whether a replica may be sent work: only when READY."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class Transport(StrEnum):
    """How a router's calls reach an expert replica."""

    AUTO = "auto"  # shared memory on the same node, else gRPC
    GRPC = "grpc"  # over TCP
    UNIX = "unix"  # gRPC over a unix socket
    SHM = "shm"  # shared memory


@dataclass(frozen=True, slots=True)
class Replica:
    """One live service, as the registry knows it."""

    id: str
    role: Role
    deployment: str  # e.g. experts-3
    address: str  # host:port of its gRPC server
    node: str
    model: str
    revision: str
    state: ReplicaState = ReplicaState.READY
    held: ExpertSet = field(default_factory=ExpertSet)  # empty unless role is EXPERT
    leaving: ExpertSet = field(
        default_factory=ExpertSet
    )  # still answered, until every router has acknowledged the epoch
    placement_epoch: int = (
        0  # of an expert replica: the one `held` follows; of a router: the one its table has taken in
    )
    wire_version: int = WIRE_VERSION
    launched: float = 0.0  # Unix seconds at which its process began to build it; 0 = unknown, here and below
    loaded: float = 0.0  # its weights were in memory
    started: float = 0.0  # it was registered
    served: float = 0.0  # it had computed its first rows; experts only
    pid: int = 0
    scaling: Mapping[str, float] = field(default_factory=dict)  # how its deployment scales, where user_config says so


@dataclass(frozen=True, slots=True)
class Placement:
    """Which deployment holds which experts; `epoch` grows by one with every change."""

    epoch: int
    held: Mapping[str, ExpertSet]
