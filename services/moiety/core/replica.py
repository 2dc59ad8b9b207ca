"""A live service as the registry lists it, and the placement of experts on deployments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from moiety.core.experts import ExpertSet

WIRE_VERSION = 4


class Role(StrEnum):
    """The kind of a service."""

    EXPERT = "expert"
    ROUTER = "router"
    GATEWAY = "gateway"


class ReplicaState(StrEnum):
    """The state of a replica. New work goes to READY ones, and to SICK ones if no other can do it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    SICK = "sick"  # it fails or does not get on; READY again if it recovers


class Transport(StrEnum):
    """How a router's calls reach an expert replica."""

    AUTO = "auto"  # shared memory on the same node, else gRPC
    GRPC = "grpc"  # over TCP
    SHM = "shm"  # shared memory


@dataclass(frozen=True, slots=True)
class Replica:
    """One live service, as the registry lists it."""

    id: str
    role: Role
    deployment: str  # e.g. experts-3
    address: str  # host:port of its gRPC server
    node: str
    model: str
    revision: str
    state: ReplicaState = ReplicaState.READY
    held: ExpertSet = field(default_factory=ExpertSet)  # empty unless role is EXPERT
    # experts that the placement took away: still answered, until every router has acknowledged the epoch
    leaving: ExpertSet = field(default_factory=ExpertSet)
    placement_epoch: int = 0  # an expert replica: the epoch that `held` follows; a router: the epoch of its table
    wire_version: int = WIRE_VERSION
    launched: float = 0.0  # Unix seconds when its process began to build it; 0 = unknown, here and below
    loaded: float = 0.0  # when its weights were in memory
    started: float = 0.0  # when it was registered
    served: float = 0.0  # when it had computed its first rows; experts only
    pid: int = 0
    kind: str = ""  # of an expert replica, for the cost model: device, format of the weights, pace
    scaling: Mapping[str, float] = field(default_factory=dict)  # live scaling settings from user_config
    http_address: str = ""  # host:port of its HTTP server; gateways only
    version: str = ""  # of Moiety; "" = unknown
    problem: str = ""  # for an operator: why it is sick, or which live settings it refused


def ready_experts(replicas: Iterable[Replica]) -> list[Replica]:
    """Returns the expert replicas among `replicas` that may get new work."""
    return [one for one in replicas if one.role is Role.EXPERT and one.state is ReplicaState.READY]


@dataclass(frozen=True, slots=True)
class Placement:
    """Which deployment holds which experts; `epoch` grows by one with every change."""

    epoch: int
    held: Mapping[str, ExpertSet]
