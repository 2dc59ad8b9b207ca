"""The bodies of requests, as values: OpenAI's fields, and those of vLLM that its users rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moiety.errors import InvalidRequest
from moiety.gateway.http.schema.fields import Biases, Ids, Integer, Json, Object, Objects, Prompts, Strings, shown

B = TypeVar("B", bound="Body")

# Fields that would change the output, so that ignoring them would give a wrong answer.
_UNSUPPORTED = "absent: it is not supported"
_REFUSED = (
    "use_beam_search",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "bad_words",
    "allowed_token_ids",
    "logits_processors",
    "include_stop_str_in_output",
    "thinking_token_budget",
)
# What a value must be, by pydantic's name of the error. Other errors keep pydantic's words.
_BOUNDS = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a text",
    "list_type": "a list",
    "model_type": "an object",
}


class Body(BaseModel):
    """A request's body. Unknown fields are ignored, as OpenAI's clients may be newer than this server."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", use_attribute_docstrings=True)
    refused: ClassVar[Mapping[str, str]] = {}  # field -> what it must be

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Returns the checked body. Raises InvalidRequest for the first field that is wrong."""
        for name, bound in cls.refused.items():
            if content.get(name):
                raise InvalidRequest(name, shown(content[name]), bound)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "missing":
                raise InvalidRequest(name, None, "present") from None
            bound = _BOUNDS.get(first["type"]) or first["msg"].removeprefix("Input should be ")
            raise InvalidRequest(name, shown(first["input"]), bound) from None


class StreamOptions(Body):
    """What a stream contains besides its output."""

    include_usage: bool | None = None
    """Ends the stream with a chunk of token counts."""
    continuous_usage_stats: bool | None = None
    """Every chunk has the counts so far."""


class GenerationBody(Body):
    """The fields that completions and chat have in common. generation.proto gives the bounds of the sampling parameters."""

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(_REFUSED, _UNSUPPORTED)

    model: str | None = None
    """The served model's name; absent: the only one."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Integer | None = None
    n: Integer | None = None
    temperature: float | None = None
    """Default: that of the checkpoint's generation_config.json, or 1."""
    top_p: float | None = None
    top_k: Integer | None = None
    """0 or -1: the whole vocabulary."""
    min_p: float | None = None
    seed: Integer | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases | None = None
    stop: Strings | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = None
    skip_special_tokens: bool | None = None
    response_format: Object | None = None
    """text, json_object, or json_schema."""
    structured_outputs: Object | None = None
    """One of json, regex, choice, grammar (Lark), json_object."""
    guided_json: Json | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    priority: Integer | None = None
    """-100 to 100; lower runs first."""
    user: str | None = None
    """Names share capacity fairly and share no cached prefixes."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Log probabilities name tokens as token_id:5."""

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "an object", "absent without stream")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionBody(GenerationBody):
    """The body of POST /v1/completions."""

    refused: ClassVar[Mapping[str, str]] = {
        **GenerationBody.refused,
        "suffix": _UNSUPPORTED,
        "prompt_embeds": _UNSUPPORTED,
    }

    prompt: Prompts
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    echo: bool | None = None
    """The text begins with the prompt, and log probabilities with those of the prompt."""
    logprobs: Integer | None = None
    """0 to 20: how many of the likeliest tokens to return beside each chosen one."""
    best_of: Integer | None = None
    """Only the value of n."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer puts its special tokens before the prompt. Only true."""


class ChatBody(GenerationBody):
    """The body of POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, str]] = {
        **GenerationBody.refused,
        "functions": "absent: use tools",
        "function_call": "absent: use tool_choice",
        "chat_template": "absent: the checkpoint's template is used",
        "documents": _UNSUPPORTED,
        "audio": _UNSUPPORTED,
    }

    messages: Objects
    max_completion_tokens: Integer | None = None
    """Default: all that the context has left."""
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    tools: list[Object] | None = None
    tool_choice: Json | None = None
    """auto, none, required, or the function to call."""
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """Given to the chat template."""
    chat_template_kwargs: Object | None = None
    """Further variables of the chat template, such as enable_thinking."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeBody(Body):
    """The body of POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    tools: list[Object] | None = None
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages, whose template has them."""
    return_token_strs: bool | None = None
    chat_template_kwargs: Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class DetokenizeBody(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Ids
