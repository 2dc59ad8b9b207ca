"""One lane's StepBackend: sends a layer's rows to the replicas that hold the experts and gets the results back.

`layer_call.py` follows the calls of one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moiety.core.expert_backend import ExpertBackend
from moiety.router.hop.call import RoutedRows
from moiety.router.hop.context import HopContext
from moiety.router.hop.layer_call import LayerCall
from moiety.router.step_context import StepContext
from moiety.wire.rows import RowBuffer

Wrapper = Callable[[ExpertBackend, StepContext], ExpertBackend]  # changes what one step sends to the backend it gets


class Hop:
    """The StepBackend of one lane. One thread runs all lanes of a fleet and owns the fleet's mailbox.

    Several layers, of one lane or of several, may be in flight. While the thread waits for one of them, it handles the
    events of all of them.
    """

    def __init__(self, context: HopContext, wrappers: Sequence[Wrapper] = ()):
        """`wrappers` are applied to each step's backend; the last one gets the model's rows first."""
        self.context, self._wrappers = context, wrappers
        self.open: set[LayerCall] = set()  # layers that were submitted and not yet waited for
        self.layer_began_ns = 0  # Unix time at which the previous layer ended, or the step began

    def begin_step(self, step: StepContext) -> ExpertBackend:
        """Starts `step` and returns the backend for its layers."""
        self.layer_began_ns = time.time_ns()
        for abandoned in self.open:  # what ran between `submit` and `result` failed, such as a shared expert
            abandoned.end()
        self.open.clear()
        self.poll()
        backend: ExpertBackend = _StepHop(self, step)
        for wrap in self._wrappers:
            backend = wrap(backend, step)
        return backend

    def poll(self) -> None:
        """Handles the events that have arrived, without waiting. An idle thread calls it now and then."""
        self.context.fleet.mailbox.wait(0.0)


@dataclass(frozen=True, slots=True)
class _StepHop:
    """The ExpertBackend of one step."""

    hop: Hop
    step: StepContext

    def submit(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> _LayerOutput:
        """Sends hidden [T, D] to the experts in top_k_index [T, K] (int64, -1: none)."""
        tokens, top_k = top_k_index.shape
        experts = top_k_index.reshape(-1).cpu().numpy()  # [A]
        wanted = (experts >= 0).nonzero()[0]
        make = torch.empty if len(wanted) == len(experts) else torch.zeros  # rows without an expert are zero
        output = make(len(experts), hidden.shape[1], dtype=hidden.dtype)  # [A, D]
        routed = RoutedRows(
            layer, top_k, experts, wanted, RowBuffer.of(hidden.contiguous().cpu()), RowBuffer.of(output)
        )
        call = LayerCall(self.hop.context, self.step, routed, self.hop.layer_began_ns)
        self.hop.open.add(call)
        call.send()
        return _LayerOutput(self.hop, call, output.view(tokens, top_k, -1), hidden.device)


@dataclass(frozen=True, slots=True)
class _LayerOutput:
    """The PendingRows of one layer."""

    hop: Hop
    call: LayerCall
    output: torch.Tensor  # [T, K, D], on the host; complete once `call` is
    device: torch.device

    def result(self) -> torch.Tensor:
        try:
            self.call.wait()
        finally:
            self.hop.open.discard(self.call)
            self.hop.layer_began_ns = time.time_ns()
        return self.output.to(self.device)
