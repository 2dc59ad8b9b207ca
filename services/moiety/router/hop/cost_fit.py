"""Fits the cost model from what expert replicas say of their batches: sampled by the engine's thread, fitted elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from moiety.core.load import BatchCost
from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.policy.cost_model import CostModel, Sample, fit

SAMPLE_S = 0.01  # between two samples: the engine's thread gives them a clock reading each, and no more


class CostFit:
    """One router's fit, of all replicas it asks: they are of one device and dtype."""

    def __init__(self, expert_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`expert_bytes`: of one expert's matrices; where they are quantised, what one costs is fitted all the same."""
        self._expert_bytes, self._clock = expert_bytes, clock
        self._model = CostModel()
        self._next = 0.0
        self._samples: deque[Sample] = deque(maxlen=1024)

    def answered(self, reply: ForwardResponse) -> None:
        """One OK reply; by the engine's thread."""
        if (now := self._clock()) >= self._next:
            self._next = now + SAMPLE_S
            weights = float(self._expert_bytes * reply.activated_experts)
            self._samples.append(Sample(weights, float(reply.batch_rows), reply.compute_ms / 1000))

    @property
    def error(self) -> float | None:
        """Of the fit as it was read last, relative to what batches took; None while nothing is known. From any thread."""
        return self._model.error

    def reading(self) -> BatchCost | None:
        """The fit after all samples so far, of some 25 µs each; None while nothing is known. By one other thread."""
        samples = [self._samples.popleft() for _ in range(len(self._samples))]
        self._model = model = fit(samples, self._model)
        if model.error is None:
            return None
        return BatchCost(
            model.fixed_s, model.s_per_byte, model.s_per_row, self._expert_bytes, model.seen, round(model.error, 4)
        )
