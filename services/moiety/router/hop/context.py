"""What all layers of a router share: the replicas, the settings, and everything that counts or times calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.router.hop.call_limits import CallLimits
from moiety.router.hop.cost_fit import CostFit
from moiety.router.hop.expert_demand import ExpertDemandCounter
from moiety.router.hop.fleet import Fleet
from moiety.router.hop.hedging import Hedging
from moiety.router.hop.overflow import OverrunReplicas
from moiety.telemetry.tracing import Tracer


@dataclass(frozen=True, slots=True)
class HopContext:
    """What every layer uses, in every lane of a router."""

    fleet: Fleet
    system_key: str  # of SystemId, in every call
    dtype: torch.dtype  # of the rows on the wire
    expert_wait_s: float  # how long a layer waits for an expert without a holder
    hedging: Hedging
    demand: ExpertDemandCounter
    costs: CostFit
    limits: CallLimits
    tracer: Tracer
    # wait(seconds) returns once an event was handled or the time is over. Lanes let another lane run meanwhile
    # (`Lanes.wait`); without lanes it blocks in the fleet's mailbox (`Mailbox.wait`).
    wait: Callable[[float], object]
    queues: OverrunReplicas | None = None  # under the overflow policy `backup`

    def __post_init__(self) -> None:
        self.fleet.add_memory(self.limits.keep)

    def record(self, replica: str, reply: ForwardResponse, took_s: float) -> None:
        """Records the batch cost and queue wait that an OK reply reports, `took_s` seconds after its call."""
        self.costs.record(self.fleet.kind_of(replica), reply, took_s)
        self.limits.record(replica, reply, took_s)
        if self.queues is not None:
            self.queues.record(replica, reply.queue_ms)

    def limit_s(self, replica: str, rows: int) -> float:
        """Returns the seconds after which a call of `rows` (token, expert) pairs is late."""
        return self.limits.of(replica, self.fleet.kind_of(replica), rows)
