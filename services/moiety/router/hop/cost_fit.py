"""Fits the cost model to the batch times in expert replies: the engine's thread keeps samples, another thread fits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from moiety.core.load import BatchCost
from moiety.internal.v1.experts_pb2 import ForwardResponse
from moiety.policy.cost_model import KernelCost, Sample, fit

SAMPLE_S = 0.01  # between two samples of a kind; a reply in between costs the engine's thread one clock reading
MOST_KINDS = 16  # a replica names its kind itself


@dataclass(slots=True)
class _Kind:
    """The replicas of one device, format of weights and pace."""

    model: KernelCost = field(default_factory=KernelCost)
    next: float = 0.0
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=1024))


class CostFit:
    """Fits one cost model per kind of the replicas that a router calls (DescribeReplicaResponse.kind)."""

    def __init__(self, expert_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`expert_bytes`: size of one expert's matrices. If replicas quantise them, the fitted cost per byte becomes lower."""
        self._expert_bytes, self._clock = expert_bytes, clock
        self._kinds: dict[str, _Kind] = {}

    def record(self, kind: str, reply: ForwardResponse, took_s: float) -> None:
        """Keeps the batch time of an OK reply as a sample, at most one per kind and SAMPLE_S. Called by the engine's thread.

        `took_s`: how long the router waited for the reply. A reply that claims more, or anything impossible, is left out.
        """
        if (of := self._kinds.get(kind)) is None:
            of = self._add(kind)
        if (now := self._clock()) < of.next:
            return
        of.next = now + SAMPLE_S
        seconds = reply.compute_ms / 1000
        if 0.0 < seconds <= took_s and 0 < reply.activated_experts <= reply.batch_rows:
            weights = float(self._expert_bytes * reply.activated_experts)
            of.samples.append(Sample(weights, float(reply.batch_rows), seconds))

    def predict(self, kind: str, experts: int, rows: int) -> float:
        """Predicts the seconds of a batch of `rows` for `experts` distinct experts; 0 before anything was fitted."""
        of = self._kinds.get(kind)
        return of.model.predict(float(self._expert_bytes * experts), float(rows)) if of else 0.0

    @property
    def error(self) -> float | None:
        """The largest relative error of a kind's model at the last call of `reading`; None before the second sample."""
        errors = [of.model.error for of in tuple(self._kinds.values()) if of.model.error is not None]
        return max(errors, default=None)

    def reading(self) -> tuple[BatchCost, ...]:
        """Fits the new samples and returns the fitted costs of each kind that has two samples.

        Takes about 25 µs per new sample. Called by one thread other than the engine's.
        """
        costs = []
        for kind, of in tuple(self._kinds.items()):
            of.model = model = fit([of.samples.popleft() for _ in range(len(of.samples))], of.model)
            if model.error is not None:
                of_kind = model.fixed_s, model.s_per_byte, model.s_per_row, self._expert_bytes, model.seen
                costs.append(BatchCost(*of_kind, round(model.error, 4), kind))
        return tuple(costs)

    def _add(self, kind: str) -> _Kind:
        if len(self._kinds) >= MOST_KINDS:
            del self._kinds[min(self._kinds, key=lambda known: self._kinds[known].next)]
        return self._kinds.setdefault(kind, _Kind())
