"""What a client asks the gateway for, and what it gets: values that no transport and no router's protocol shapes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moiety.core.sampling import FinishReason, TopLogprobs
from moiety.core.sampling_options import SamplingOptions
from moiety.core.timings import Timings


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that the checkpoint's chat template renders. Messages and tools are JSON objects as OpenAI's API has them."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further variables of the template
    opens_reply: bool = True  # whether the prompt ends with the opening of the assistant's message
    continues_last: bool = False  # whether the output continues the last message


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, and how to continue it. Bounds are those of generation.proto."""

    prompt: str | Sequence[int] | Conversation  # text, token ids, or messages
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    model: str = ""  # empty: the only one
    request_id: str = ""  # empty: drawn
    priority: int = 0
    tenant: str = ""
    host: str = ""  # of the client, as admission counts it
    traceparent: str | None = None
    keep_special: bool = False  # whether special tokens are part of the text


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a whole request."""

    prompt_tokens: int
    completion_tokens: int  # of all choices
    cached_tokens: int  # of the prompt, found in the prefix cache
    rerouted: float = 0.0  # fraction of (token, expert) rows that another expert computed


@dataclass(slots=True)  # not frozen: that would double the time to make one, of which there is one per token
class Delta:
    """What one choice gains: text, the tokens that it comes from, or its end. `Outputs` fills it; others only read it."""

    choice: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[float] = ()  # of token_ids, where asked for
    top_logprobs: Sequence[TopLogprobs] = ()  # likewise
    prompt_ids: Sequence[int] = ()  # the prompt as a router got it; on the first delta of a request
    prompt_logprobs: Sequence[float] = ()  # of the prompt's tokens but the first; on one delta of a request
    prompt_top_logprobs: Sequence[TopLogprobs] = ()  # likewise
    finish: FinishReason | None = None  # on the last delta of a choice
    matched_stop: str | int | None = None  # the stop string or stop token of the request that ended the choice
    usage: Usage | None = None  # on the last delta of the last choice
    timings: Timings | None = None  # likewise


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for."""

    name: str
    revision: str
    max_context: int  # tokens of prompt and output together; of an encoder-decoder, each of the two


def new_request_id() -> str:
    """Returns an id for a request whose client gave none."""
    return secrets.token_hex(8)
