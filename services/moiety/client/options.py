"""What a request can ask for: the kinds of prompts and the keyword options of `generate`, which all clients share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

Messages = Sequence[Mapping[str, str]]  # a conversation, oldest first: {"role": "user", "content": "…"}
Prompt = str | Sequence[int] | Messages  # a text, token ids, or messages for the checkpoint's chat template


class GenerateOptions(TypedDict, total=False):
    """The keyword options of `generate`. generation.proto gives bounds and defaults; None means the default."""

    model: str  # the name of a served model; "": the only one
    template_arguments: Mapping[str, Any]  # further variables of the chat template: {"enable_thinking": False}

    recommended: bool  # defaults of sampling are what the model's publisher recommends, as in the HTTP API
    max_tokens: int | None  # most tokens to generate
    min_tokens: int | None  # no end before that many
    stop: str | Sequence[str]  # the output ends before the first of these texts
    stop_token_ids: Sequence[int]  # each ends the output and is sent
    ignore_eos: bool  # go on after the end of sequence
    n: int | None  # choices of one prompt

    temperature: float | None  # 0: the likeliest token
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None  # token id -> what is added to its logit

    json_schema: str | Mapping[str, Any] | None  # what the output must match: JSON text, or the schema itself
    regex: str | None  # likewise, in Rust's syntax; at most one of json_schema, regex and grammar
    grammar: str | None  # likewise, in Lark's syntax
    first_token: str | int | None  # the text or the id of the output's first token

    logprobs: bool  # of the sampled tokens
    top_logprobs: int | None  # and that many of the likeliest of each position
    prompt_logprobs: bool  # of the prompt's tokens

    priority: int  # lower runs first
    tenant: str  # tenants share capacity fairly and share no cached prefixes
    request_id: str  # repeated in responses, logs and traces; "": drawn
    timeout_s: float | None  # of the whole request, retries included
    retries: int  # how often a request that a full queue refuses is sent again, after the gateway's retry delay
