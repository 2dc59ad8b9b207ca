"""What an engine needs of the experts (StepBackend), and what it passes them for each step (StepContext)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moiety.core.expert_backend import CallClass, ExpertBackend
from moiety.telemetry.tracing import Span


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the hop needs to know about the current step."""

    call_class: CallClass
    span: Span
    check: Callable[[], None]  # raises if a request of the step must end, or the engine stops
    # reports (layer, experts): the step waits because no replica holds these experts
    report_missing: Callable[[int, list[int]], None]
    # Under the overflow policy `backup`, called for each layer with bool [T, K]: rows sent to another expert than the gate's.
    report_rerouted: Callable[[np.ndarray], None] = lambda _rerouted: None


class StepBackend(Protocol):
    """What computes the experts of one lane's steps: the hop, or experts in this process."""

    @property
    def layer_began_ns(self) -> int:
        """Unix time in nanoseconds at which the previous layer was done, or at which the step began."""
        ...

    def begin_step(self, step: StepContext) -> ExpertBackend:
        """Starts `step`. Returns the backend for its layers."""
        ...

    def poll(self) -> None:
        """Handles messages that have arrived, without waiting. An idle engine thread calls this."""
        ...
