"""Fits the cost model to the batch times in expert replies: the engine's thread keeps samples, another thread fits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from moiety.core.load import BatchCost
from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.policy.cost_model import KernelCost, Sample, fit

SAMPLE_S = 0.01  # between two samples; a reply in between costs the engine's thread one clock reading


class CostFit:
    """Fits one cost model to all replicas that a router calls. They share one device type and dtype."""

    def __init__(self, expert_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`expert_bytes`: size of one expert's matrices. If replicas quantise them, the fitted cost per byte becomes lower."""
        self._expert_bytes, self._clock = expert_bytes, clock
        self._model = KernelCost()
        self._next = 0.0
        self._samples: deque[Sample] = deque(maxlen=1024)

    def record(self, reply: ForwardResponse) -> None:
        """Keeps an OK reply's batch time as a sample, at most one per SAMPLE_S. Called by the engine's thread."""
        if (now := self._clock()) >= self._next:
            self._next = now + SAMPLE_S
            weights = float(self._expert_bytes * reply.activated_experts)
            self._samples.append(Sample(weights, float(reply.batch_rows), reply.compute_ms / 1000))

    @property
    def error(self) -> float | None:
        """The cost model's relative error at the last call of `reading`; None before the second sample. From any thread."""
        return self._model.error

    def reading(self) -> BatchCost | None:
        """Fits the new samples and returns the fitted costs, or None before the second sample.

        Takes about 25 µs per new sample. Called by one thread other than the engine's.
        """
        samples = [self._samples.popleft() for _ in range(len(self._samples))]
        self._model = model = fit(samples, self._model)
        if model.error is None:
            return None
        return BatchCost(
            model.fixed_s, model.s_per_byte, model.s_per_row, self._expert_bytes, model.seen, round(model.error, 4)
        )
