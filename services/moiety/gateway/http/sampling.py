"""From a request's body to sampling options, with the defaults of this API."""

from __future__ import annotations

from collections.abc import Mapping

from moiety.core.sampling import Guide
from moiety.core.sampling_options import MAX_CHOICES, SamplingOptions
from moiety.errors import InvalidRequest
from moiety.gateway.http.schema.bodies import GenerationBody
from moiety.model.checkpoint.generation_defaults import GenerationDefaults

COMPLETION_TOKENS = 16  # what OpenAI's completions have by default
_SEEDS = 1 << 64


def options_of(
    body: GenerationBody,
    defaults: GenerationDefaults,
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    guide: Guide | None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    prompt_logprobs: bool = False,
) -> SamplingOptions:
    """Returns the options of a request. `default_max_tokens` None: all that the context has left.

    What the request leaves out is as the checkpoint's publisher recommends it, and otherwise as in OpenAI's API.
    """
    asked = SamplingOptions(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=0 if body.top_k == -1 else body.top_k,
        min_p=body.min_p,
        seed=_seed(body.seed),
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias or {},
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        stop=body.stop or (),
        stop_token_ids=body.stop_token_ids or (),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        n=body.n,
        guide=guide,
    )
    return defaults.filled_in(asked, default_max_tokens)


def choices_of(body: GenerationBody) -> int:
    """Returns how many choices a request asks for. Raises InvalidRequest for too many, before anything is made for each."""
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidRequest("n", n, f"1 to {MAX_CHOICES}")
    return n


def field_names(prompt: str, guide_field: str | None, **others: str) -> Mapping[str, str]:
    """Returns the client's names of the core's fields, for error messages.

    `prompt`: the client's field of the prompt. `guide_field`: the field that the guide comes from. `others`: the core's
    sampling parameter -> the client's field.
    """
    names = {"prompt.text": prompt, "prompt.token_ids": prompt, "prompt": prompt, "tenant": "user"}
    if guide_field is not None:
        names |= {f"sampling.guide.{kind}": guide_field for kind in ("json_schema", "regex", "grammar")}
    return names | {f"sampling.{name}": field for name, field in others.items()}


def _seed(value: int | None) -> int | None:
    """Returns the seed as the core counts it: OpenAI's may be negative."""
    if value is None:
        return None
    if not -_SEEDS // 2 <= value < _SEEDS:
        raise InvalidRequest("seed", value, f"{-_SEEDS // 2} to {_SEEDS - 1}")
    return value % _SEEDS
