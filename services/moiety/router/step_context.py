"""What the engine asks of an expert backend, and what the hop is told: once for all calls, and anew for every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moiety.core.expert_backend import CallClass, ExpertBackend
from moiety.telemetry.tracing import Span


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the hop must know of the step it works for."""

    call_class: CallClass
    span: Span
    check: Callable[[], None]  # raises once a request of the step was cancelled or has expired
    waits: Callable[[int, list[int]], None]  # tells the policy that experts of a layer are waited for
    # Told of each layer under the overflow policy `backup`: bool [T, K], which rows went to another expert than the gate's.
    routed: Callable[[np.ndarray], None] = lambda _rerouted: None


class StepBackend(ExpertBackend, Protocol):
    """An ExpertBackend that an Engine can run on: the hop, or experts in this process."""

    @property
    def layer_began_ns(self) -> int:
        """Unix time, in nanoseconds, at which the layer before was done, or the step began."""
        ...

    def begin_step(self, step: StepContext) -> None:
        """Every layer submitted from now on belongs to `step`."""
        ...

    def poll(self) -> None:
        """Handles what has come meanwhile, without waiting; for a thread that is idle."""
        ...
