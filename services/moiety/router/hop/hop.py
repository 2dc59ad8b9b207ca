"""One lane's ExpertBackend: sends a layer's rows to the replicas that hold the experts and gets the results back.

`layer_call.py` follows the calls of one layer. This file holds what all layers of a lane share.
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
from moiety.router.hop.overflow import OverrunReplicas
from moiety.router.step_context import StepContext
from moiety.telemetry.tracing import Tracer


@dataclass(frozen=True, slots=True)
class HopSettings:
    """What all layers share: the model's revision and dtype, and how long a layer waits for an expert without a holder."""

    revision: str
    dtype: torch.dtype
    expert_wait_s: float


class Hop:
    """The ExpertBackend of one lane. One thread runs all lanes of a fleet and owns the fleet's mailbox.

    Several layers, of one lane or of several, may be in flight. While the thread waits for one of them, it handles the
    events of all of them.
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
        queues: OverrunReplicas | None = None,
    ):
        """`wait(seconds)` returns once an event was handled or the time is over. The default blocks in the mailbox.
        Lanes that share the thread pass a function that lets another lane run instead.
        """
        self.fleet, self.settings, self.hedging, self.demand, self.tracer = fleet, settings, hedging, demand, tracer
        self.costs, self.queues = costs, queues
        self.wait = wait or fleet.mailbox.wait
        self.layer_began_ns = 0  # Unix time at which the previous layer ended, or the step began
        self._step: StepContext | None = None

    def begin_step(self, step: StepContext) -> None:
        """Starts `step`: every layer submitted from now on belongs to it."""
        self._step = step
        self.layer_began_ns = time.time_ns()
        self.poll()

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> LayerCall:
        """Sends hidden [T, D] to the experts in top_k_index [T, K] (int64, -1: none)."""
        assert self._step is not None, "submit outside a step"
        return LayerCall(self, self._step, layer, hidden, top_k_index)

    def record(self, replica: str, reply: ForwardResponse) -> None:
        """Records the batch cost and queue wait that an OK reply reports."""
        self.costs.record(reply)
        if self.queues is not None:
            self.queues.record(replica, reply.queue_ms)

    def poll(self) -> None:
        """Handles the events that have arrived, without waiting. An idle thread calls it now and then."""
        self.fleet.mailbox.wait(0.0)
