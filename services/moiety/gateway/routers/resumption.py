"""Requests that resume after the loss of their router: one for each unfinished choice."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.internal.v1 import engine_pb2


def choices_of(request: engine_pb2.EngineRequest) -> range:
    """Returns the choices that an engine request asks for."""
    return range(request.choice, request.choice + max(request.sampling.n, 1))


def resumed_request(request: engine_pb2.EngineRequest, choice: int, ids: Sequence[int]) -> engine_pb2.EngineRequest:
    """Returns a request for one choice of `request`, which resumes after the tokens `ids` that were already sent."""
    resumed = engine_pb2.EngineRequest()
    resumed.CopyFrom(request)
    resumed.choice, resumed.sampling.n = choice, 1
    resumed.generated_ids[:] = ids
    return resumed
