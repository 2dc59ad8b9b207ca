"""Fakes that ship with the project: real gRPC services on loopback that compute simple functions, and a Hop over them.

No fake mocks the transport: a fake replica reads and answers the same frames as a real one, so tests against it run the
code that production runs. It can be set to wait, refuse, answer twice or vanish.
"""

from moiety.testing.callers import Caller, LoopbackHop, loopback_hop, open_caller
from moiety.testing.common import (
    HOST,
    MODEL,
    SYSTEM,
    eventually,
    fake_expert,
    fake_layer,
    fake_replica,
    fake_shape,
    fake_system,
    fake_token,
    owner_of,
)
from moiety.testing.engines import FakeEngine
from moiety.testing.experts import FakeExperts
from moiety.testing.gateways import FakeGateway

__all__ = [
    "HOST",
    "MODEL",
    "SYSTEM",
    "Caller",
    "FakeEngine",
    "FakeExperts",
    "FakeGateway",
    "LoopbackHop",
    "eventually",
    "fake_expert",
    "fake_layer",
    "fake_replica",
    "fake_shape",
    "fake_system",
    "fake_token",
    "loopback_hop",
    "open_caller",
    "owner_of",
]
