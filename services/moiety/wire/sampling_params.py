"""Checks prompts and labels of requests, and turns sampling parameters into protobuf and back, for gateway and router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moiety.core.sampling import Guide, GuideKind, Sampling
from moiety.core.sampling_options import MAX_CHOICES, SamplingOptions
from moiety.errors import InvalidRequest
from moiety.internal.v1.engine_pb2 import EngineRequest
from moiety.v1.generation_pb2 import SamplingParams

MAX_REQUEST_ID, MAX_TENANT = 128, 128  # characters
MAX_PRIORITY = 100
MAX_END_IDS = 256  # end-of-sequence ids of a checkpoint
_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "n",
)
_PLAIN = ("ignore_eos", "min_tokens", "logprobs", "top_logprobs", "prompt_logprobs")
SCALARS = (*_OPTIONAL, *_PLAIN)  # fields of SamplingParams that have the same name wherever sampling is asked for


class Labelled(Protocol):
    """A request with labels: a message of either API, or a value."""

    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def request_id(self) -> str: ...


def check_labels(request: Labelled) -> None:
    """Raises InvalidRequest unless priority, tenant and request id are within their bounds."""
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", request.priority, f"{-MAX_PRIORITY} to {MAX_PRIORITY}")
    if len(request.tenant) > MAX_TENANT:
        raise InvalidRequest("tenant", request.tenant, f"at most {MAX_TENANT} characters")
    if len(request.request_id) > MAX_REQUEST_ID:
        raise InvalidRequest("request_id", request.request_id, f"at most {MAX_REQUEST_ID} characters")


def check_resolved(request: EngineRequest, max_tokens: int) -> None:
    """Raises InvalidRequest if a router is asked for what only a gateway can do, or to resume what has ended."""
    _check("stop", f"{len(request.sampling.stop)} strings", not request.sampling.stop, "empty: a gateway matches them")
    named = request.sampling.HasField("first_token")
    _check("first_token", request.sampling.first_token, not named, "resolved by a gateway to first_token_id")
    if len(request.generated_ids) >= max_tokens:
        count = f"{len(request.generated_ids)} tokens"
        raise InvalidRequest("generated_ids", count, f"fewer than max_tokens, {max_tokens}")
    if request.choice + max(request.sampling.n, 1) > MAX_CHOICES:
        raise InvalidRequest("choice", request.choice, f"at most {MAX_CHOICES} - n")
    if len(request.stop_ids) > MAX_END_IDS:
        raise InvalidRequest("stop_ids", f"{len(request.stop_ids)} ids", f"at most {MAX_END_IDS} ids")


def check_prompt(ids: Sequence[int], vocabulary: int, max_context: int) -> None:
    """Raises InvalidRequest unless `ids` is a valid prompt that leaves context for at least one token."""
    if not ids:
        raise InvalidRequest("prompt", "", "at least one token")
    if len(ids) >= max_context:
        raise InvalidRequest("prompt", f"{len(ids)} tokens", f"below the context of {max_context} tokens")
    if (worst := max(ids)) >= vocabulary:
        raise InvalidRequest("prompt.token_ids", worst, f"below the vocabulary of {vocabulary}")


def options_of(params: SamplingParams) -> SamplingOptions:
    """Returns what a message asks for. Raises InvalidRequest for a guide of no kind."""
    given = {name: getattr(params, name) for name in _OPTIONAL if params.HasField(name)}
    plain = {name: getattr(params, name) for name in _PLAIN}
    first = params.WhichOneof("first")
    return SamplingOptions(
        **given,
        **plain,
        logit_bias=dict(params.logit_bias),
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        guide=_guide(params),
        first_token=getattr(params, first) if first else None,
    )


def params_of(sampling: Sampling) -> SamplingParams:
    """Returns the message of settings whose defaults are filled in.

    It holds the seed, so a router that takes over the request samples the same tokens.
    """
    params = SamplingParams(
        **{name: getattr(sampling, name) for name in SCALARS},
        logit_bias=sampling.logit_bias,
        stop_token_ids=sampling.stop_token_ids,
    )
    if sampling.guide is not None:
        setattr(params.guide, sampling.guide.kind, sampling.guide.text)
    if sampling.first_token_id is not None:
        params.first_token_id = sampling.first_token_id
    return params


def _check(field: str, value: object, holds: bool, bound: str) -> None:
    if not holds:
        raise InvalidRequest(f"sampling.{field}", value, bound)


def _guide(params: SamplingParams) -> Guide | None:
    if not params.HasField("guide"):
        return None
    kind = params.guide.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("sampling.guide", None, f"one of {', '.join(GuideKind)}")
    return Guide(GuideKind(kind), getattr(params.guide, kind))
