"""Builds what a router is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.core.sampling import Sampling
from moiety.core.system import SystemId
from moiety.gateway.request import GenerationRequest
from moiety.internal.v1.engine_pb2 import EngineRequest
from moiety.wire.sampling_params import params_of


def engine_request(
    request: GenerationRequest,
    request_id: str,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    stop_ids: Sequence[int],
    system: SystemId,
) -> EngineRequest:
    """Returns `request` for a router of `system`. It names no stop strings: the gateway matches them."""
    return EngineRequest(
        request_id=request_id,
        system_key=system.key,
        prompt_ids=prompt_ids,
        sampling=params_of(sampling),
        stop_ids=stop_ids,
        priority=request.priority,
        tenant=request.tenant,
        host=request.host,
    )
