"""The public sampling parameters, checked: what gateway and router both accept, and the words of every refusal."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from math import isfinite

from moiety.core import Sampling
from moiety.errors import InvalidRequest
from moiety.wire.generation_pb2 import SamplingParams

DEFAULT_MAX_TOKENS = 128
MAX_TEMPERATURE = 10.0


def check_prompt(ids: Sequence[int], vocabulary: int, max_context: int) -> None:
    """Raises InvalidRequest unless `ids` is a prompt that leaves room for at least one token."""
    if not ids:
        raise InvalidRequest("prompt", "", "at least one token")
    if len(ids) >= max_context:
        raise InvalidRequest("prompt", f"{len(ids)} tokens", f"below the context of {max_context} tokens")
    if (worst := max(ids)) >= vocabulary:
        raise InvalidRequest("prompt.token_ids", worst, f"below the vocabulary of {vocabulary}")


def check_sampling(params: SamplingParams, prompt_tokens: int, vocabulary: int, max_context: int) -> Sampling:
    """`params` with its defaults filled in. Raises InvalidRequest naming the field and its bound."""
    room = max_context - prompt_tokens
    max_tokens = params.max_tokens if params.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, room)
    if not 1 <= max_tokens <= room:
        bound = f"1 to {room}: {prompt_tokens} prompt tokens are in a context of {max_context}"
        raise InvalidRequest("sampling.max_tokens", max_tokens, bound)
    temperature = params.temperature if params.HasField("temperature") else 0.0
    if not (isfinite(temperature) and 0.0 <= temperature <= MAX_TEMPERATURE):
        raise InvalidRequest("sampling.temperature", temperature, f"0 (greedy) to {MAX_TEMPERATURE:g}")
    top_p = params.top_p if params.HasField("top_p") else 1.0
    if not (isfinite(top_p) and 0.0 < top_p <= 1.0):
        raise InvalidRequest("sampling.top_p", top_p, "above 0, up to 1")
    if not 0 <= params.top_k <= vocabulary:
        raise InvalidRequest("sampling.top_k", params.top_k, f"0 (all) to the vocabulary of {vocabulary}")
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=params.top_k,
        seed=params.seed if params.HasField("seed") else secrets.randbits(63),
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
    )
