"""Runtimes over random experts, stopped at the end of their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from expert_support import SHAPE, MakeRuntime, weights_of

from moiety.core.experts import ExpertSet
from moiety.expert.runtime import Runtime
from moiety_kernels import ExpertWeights


@pytest.fixture
def make_runtime() -> Iterator[MakeRuntime]:
    """Gives a function (held, start=True, **settings) -> Runtime over random weights, stopped when the test ends."""
    made: list[Runtime] = []

    def load(held: ExpertSet) -> dict[tuple[int, int], ExpertWeights]:
        return {pair: weights_of(pair) for pair in held}

    def make(
        held: ExpertSet,
        *,
        start: bool = True,
        load: Callable[[ExpertSet], dict[tuple[int, int], ExpertWeights]] = load,
        queue_calls: int = 64,
        capacity: float | None = None,
    ) -> Runtime:
        runtime = Runtime(SHAPE.mlp, torch.float32, "cpu", load, queue_calls=queue_calls, capacity=capacity)
        runtime.hold(held, 0)
        made.append(runtime)
        if start:
            runtime.start()
        return runtime

    yield make
    for runtime in made:
        if runtime.alive:
            runtime.stop(10)
            assert not runtime.alive
