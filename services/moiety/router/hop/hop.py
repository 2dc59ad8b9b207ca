"""One lane's ExpertBackend: a layer's rows go out, one message per replica, and every (token, expert) row comes back.

What becomes of one layer is told in `layer_call.py`; here is what its layers share, and where their thread waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.router.hop.cost_fit import CostFit
from moiety.router.hop.expert_demand import ExpertDemandCounter
from moiety.router.hop.fleet import Fleet
from moiety.router.hop.hedging import Hedging
from moiety.router.hop.layer_call import LayerCall
from moiety.router.hop.overflow import QueueWaits
from moiety.router.step_context import StepContext
from moiety.telemetry.tracing import Tracer


@dataclass(frozen=True, slots=True)
class HopSettings:
    """What is the same for every call."""

    revision: str
    dtype: torch.dtype
    expert_wait_s: float


class Hop:
    """The ExpertBackend of one lane. All lanes of a fleet are used by one thread, which owns the fleet's mailbox.

    Several layers, of one lane or of several, may be in flight: whichever is waited for, each event is handled by the
    layer that it belongs to.
    """

    def __init__(
        self,
        fleet: Fleet,
        settings: HopSettings,
        hedging: Hedging,
        demand: ExpertDemandCounter,
        costs: CostFit,
        tracer: Tracer,
        wait: Callable[[float], None] | None = None,
        queues: QueueWaits | None = None,
    ):
        """`wait(seconds)` returns once something was handled, or the time is over: by default by blocking in the
        mailbox; lanes that take turns on the thread let another one run instead.
        """
        self.fleet, self.settings, self.hedging, self.demand, self.tracer = fleet, settings, hedging, demand, tracer
        self.costs, self.queues = costs, queues
        self.wait = wait or fleet.mailbox.wait
        self.layer_began_ns = 0  # Unix time at which the layer before was done, or the step began
        self._step: StepContext | None = None

    def begin_step(self, step: StepContext) -> None:
        """Every layer submitted from now on belongs to `step`."""
        self._step = step
        self.layer_began_ns = time.time_ns()
        self.poll()

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> LayerCall:
        """Sends hidden [T, D] to the experts in top_k_index [T, K] (int64, -1: none)."""
        assert self._step is not None, "submit outside a step"
        return LayerCall(self, self._step, layer, hidden, top_k_index)

    def answered(self, replica: str, reply: ForwardResponse) -> None:
        """Learns from an OK reply what its batch cost, and how long it waited."""
        self.costs.answered(reply)
        if self.queues is not None:
            self.queues.answered(replica, reply.queue_ms)

    def poll(self) -> None:
        """Handles what has come meanwhile, without waiting; to be called now and then by a thread that is idle."""
        self.fleet.mailbox.wait(0.0)
