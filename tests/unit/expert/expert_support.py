"""Small random experts, calls to them, and their answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from moiety.core.expert_backend import CallClass
from moiety.expert.batcher import Computed, QueuedCall
from moiety.expert.runtime import Runtime
from moiety.testing import fake_shape
from moiety.wire.deadline import Deadline
from moiety.wire.frames import ForwardCall
from moiety.wire.rows import RowBuffer, copy_rows
from moiety_kernels import ExpertWeights, grouped_expert_mlp

MakeRuntime = Callable[..., Runtime]  # see the fixture `make_runtime`
SHAPE = fake_shape(layers=3, experts=6, hidden=16)


@dataclass(slots=True)
class Answers:
    """Collects the answers to one call; more than one is a fault."""

    arrived: threading.Event = field(default_factory=threading.Event)
    given: list[Computed | BaseException] = field(default_factory=list)

    def __call__(self, result: Computed | BaseException) -> None:
        self.given.append(result)
        self.arrived.set()

    def one(self) -> Computed | BaseException:
        """Waits for the answer and returns it."""
        assert self.arrived.wait(10), "no answer"
        assert len(self.given) == 1
        return self.given[0]


def weights_of(pair: tuple[int, int]) -> ExpertWeights:
    """Returns random weights that depend on (layer, expert) only."""
    mlp, generator = SHAPE.mlp, torch.Generator().manual_seed(100 * pair[0] + pair[1])
    return ExpertWeights(
        torch.randn(2 * mlp.intermediate, mlp.hidden, generator=generator) / 4,
        torch.randn(mlp.hidden, mlp.intermediate, generator=generator) / 4,
    )


def call_for(
    experts: Iterable[int],
    *,
    layer: int = 0,
    call_class: CallClass = CallClass.DECODE,
    deadline: Deadline | None = None,
    rows: torch.Tensor | None = None,
) -> ForwardCall:
    """Returns a call with one row per expert."""
    ids = np.array(list(experts), dtype=np.int32)
    payload = rows_for(len(ids)) if rows is None else rows
    return ForwardCall(
        call_id=1,
        attempt=0,
        layer=layer,
        call_class=call_class,
        deadline=deadline or Deadline(),
        traceparent="",
        k_offsets=np.arange(len(ids) + 1, dtype=np.int32),
        experts=ids,
        payload=RowBuffer.of(payload),
    )


def rows_for(count: int) -> torch.Tensor:
    """Returns rows [count, D], the same every time."""
    return torch.randn(count, SHAPE.mlp.hidden, generator=torch.Generator().manual_seed(count))


def waiting_for(call: ForwardCall) -> tuple[QueuedCall, Answers]:
    """Returns the call as the service queues it, and the collector of its answer."""
    answers = Answers()
    return QueuedCall(call, answers), answers


def plainly(experts: Iterable[int], rows: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """The naive twin: computes each row by its expert, one at a time."""
    return torch.cat(
        [
            grouped_expert_mlp(row[None], [1], [weights_of((layer, expert))])
            for expert, row in zip(experts, rows, strict=True)
        ]
    )


def tensor_of(computed: Computed) -> torch.Tensor:
    """Returns the answered rows [A, D]."""
    out = torch.empty(len(computed.picked.order), SHAPE.mlp.hidden)
    copy_rows(computed.picked.rows, RowBuffer.of(out), chosen=computed.picked.order)
    return out
