"""Checks prompts, sampling parameters and labels of requests. Gateway and router share these bounds and error messages."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from math import isfinite

from moiety.core.sampling import Guide, GuideKind, Sampling
from moiety.errors import InvalidRequest
from moiety.internal.v1.engine_pb2 import EngineRequest
from moiety.v1.generation_pb2 import GenerateRequest, SamplingParams

DEFAULT_MAX_TOKENS = 128
MAX_TEMPERATURE = 10.0
MAX_PENALTY = 2.0  # presence and frequency penalty, absolute value
MAX_REPETITION_PENALTY = 10.0
MAX_BIAS, MAX_BIASES = 100.0, 1024
MAX_TOP_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_STOP_IDS = 64
MAX_CHOICES = 16
MAX_GUIDE_CHARACTERS = 1 << 16
MAX_REQUEST_ID, MAX_TENANT = 128, 128  # characters
MAX_PRIORITY = 100
MAX_END_IDS = 256  # end-of-sequence ids of a checkpoint


def check_labels(request: GenerateRequest | EngineRequest) -> None:
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


def check_sampling(params: SamplingParams, prompt_tokens: int, vocabulary: int, max_context: int) -> Sampling:
    """Returns `params` as a Sampling, with defaults filled in. Raises InvalidRequest that names the field and its bound.

    `prompt_tokens`: how many tokens the context holds before the output. For an encoder-decoder that is 1, the decoder's
    first token.
    """
    available = max_context - prompt_tokens
    max_tokens = params.max_tokens if params.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, available)
    if not 1 <= max_tokens <= available:
        bound = f"1 to {available}: {prompt_tokens} prompt tokens are in a context of {max_context}"
        raise InvalidRequest("sampling.max_tokens", max_tokens, bound)
    _check("top_k", params.top_k, 0 <= params.top_k <= vocabulary, f"0 (all) to the vocabulary of {vocabulary}")
    bound = f"0 to max_tokens, {max_tokens}"
    _check("min_tokens", params.min_tokens, params.min_tokens <= max_tokens, bound)
    choices = params.n if params.HasField("n") else 1
    _check("n", choices, 1 <= choices <= MAX_CHOICES, f"1 to {MAX_CHOICES}")
    _check_bias(params, vocabulary)
    _check_stops(params, vocabulary)
    _check_logprobs(params, vocabulary)
    if params.HasField("first_token_id"):
        _check_ids("first_token_id", (params.first_token_id,), vocabulary)
    return Sampling(
        max_tokens=max_tokens,
        temperature=_number(params, "temperature", 0.0, 0.0, MAX_TEMPERATURE, f"0 (greedy) to {MAX_TEMPERATURE:g}"),
        top_p=_number(params, "top_p", 1.0, 0.0, 1.0, "above 0, up to 1", above=True),
        top_k=params.top_k,
        min_p=_number(params, "min_p", 0.0, 0.0, 1.0, "0 to 1"),
        seed=params.seed if params.HasField("seed") else secrets.randbits(63),
        repetition_penalty=_number(
            params,
            "repetition_penalty",
            1.0,
            0.0,
            MAX_REPETITION_PENALTY,
            f"above 0, up to {MAX_REPETITION_PENALTY:g}",
            above=True,
        ),
        presence_penalty=_penalty(params, "presence_penalty"),
        frequency_penalty=_penalty(params, "frequency_penalty"),
        logit_bias=dict(params.logit_bias),
        ignore_eos=params.ignore_eos,
        min_tokens=params.min_tokens,
        stop_token_ids=tuple(params.stop_token_ids),
        logprobs=params.logprobs,
        top_logprobs=params.top_logprobs,
        prompt_logprobs=params.prompt_logprobs,
        n=choices,
        guide=_guide(params),
        first_token_id=params.first_token_id if params.HasField("first_token_id") else None,
    )


def write_defaults(params: SamplingParams, sampling: Sampling) -> None:
    """Copies fields of `sampling` into `params`, which may lack them.

    With the same seed, a router that takes over the request samples the same tokens.
    """
    for field in ("max_tokens", "temperature", "top_p", "top_k", "seed", "n"):
        setattr(params, field, getattr(sampling, field))


def _check(field: str, value: object, holds: bool, bound: str) -> None:
    if not holds:
        raise InvalidRequest(f"sampling.{field}", value, bound)


def _number(
    params: SamplingParams, field: str, default: float, low: float, high: float, bound: str, *, above: bool = False
) -> float:
    """Returns a field, or `default` if the field is unset.

    Raises InvalidRequest unless the value lies from `low` to `high`, both included. `above`: `low` is excluded.
    """
    value: float = getattr(params, field) if params.HasField(field) else default
    _check(field, value, isfinite(value) and low <= value <= high and not (above and value == low), bound)
    return value


def _penalty(params: SamplingParams, field: str) -> float:
    return _number(params, field, 0.0, -MAX_PENALTY, MAX_PENALTY, f"{-MAX_PENALTY:g} to {MAX_PENALTY:g}")


def _check_bias(params: SamplingParams, vocabulary: int) -> None:
    count = len(params.logit_bias)
    _check("logit_bias", f"{count} entries", count <= MAX_BIASES, f"at most {MAX_BIASES} entries")
    _check_ids("logit_bias", params.logit_bias, vocabulary)
    for token, bias in params.logit_bias.items():
        good = isfinite(bias) and abs(bias) <= MAX_BIAS
        _check(f"logit_bias[{token}]", bias, good, f"{-MAX_BIAS:g} to {MAX_BIAS:g}")


def _check_stops(params: SamplingParams, vocabulary: int) -> None:
    count = len(params.stop)
    _check("stop", f"{count} strings", count <= MAX_STOPS, f"at most {MAX_STOPS} strings")
    for text in params.stop:
        _check("stop", text, 1 <= len(text) <= MAX_STOP_CHARACTERS, f"1 to {MAX_STOP_CHARACTERS} characters each")
    count = len(params.stop_token_ids)
    _check("stop_token_ids", f"{count} ids", count <= MAX_STOP_IDS, f"at most {MAX_STOP_IDS} ids")
    _check_ids("stop_token_ids", params.stop_token_ids, vocabulary)


def _check_ids(field: str, ids: Iterable[int], vocabulary: int) -> None:
    worst = max(ids, default=0)
    _check(field, worst, worst < vocabulary, f"token ids below the vocabulary of {vocabulary}")


def _check_logprobs(params: SamplingParams, vocabulary: int) -> None:
    most = min(MAX_TOP_LOGPROBS, vocabulary)
    _check("top_logprobs", params.top_logprobs, params.top_logprobs <= most, f"0 to {most}")
    _check("top_logprobs", params.top_logprobs, params.logprobs or not params.top_logprobs, "0 without logprobs")


def _guide(params: SamplingParams) -> Guide | None:
    if not params.HasField("guide"):
        return None
    kind = params.guide.WhichOneof("kind")
    _check("guide", None, kind is not None, f"one of {', '.join(GuideKind)}")
    text = getattr(params.guide, kind)
    _check(f"guide.{kind}", text, 1 <= len(text) <= MAX_GUIDE_CHARACTERS, f"1 to {MAX_GUIDE_CHARACTERS} characters")
    _check("ignore_eos", True, not params.ignore_eos, "false with a guide: only the end of sequence ends its output")
    return Guide(GuideKind(kind), text)
