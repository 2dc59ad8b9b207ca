"""A GenerateRequest made of a prompt and options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

from moiety.client.options import GenerateOptions, Messages, Prompt
from moiety.core.text import not_utf8
from moiety.errors import InvalidRequest
from moiety.v1 import generation_pb2
from moiety.wire.sampling_params import SCALARS

_SAMPLING = ("recommended", *SCALARS)  # options that are fields of SamplingParams by the same name
_REQUEST = ("model", "priority", "tenant", "request_id")  # likewise, of GenerateRequest
_GUIDES = ("json_schema", "regex", "grammar")


def request_of(prompt: Prompt, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    """Returns the message that asks for `prompt`. `timeout_s` and `retries` are the caller's own and no part of it.

    Raises InvalidRequest for a value that a request cannot express, TypeError for an option that there is not.
    """
    if unknown := options.keys() - GenerateOptions.__optional_keys__:
        raise TypeError(f"generate() has no option {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    sampling = generation_pb2.SamplingParams()
    for name in _SAMPLING:
        if name in values:
            with _expressible(f"sampling.{name}", values[name]):
                setattr(sampling, name, values[name])
    if (first := values.get("first_token")) is not None:
        field = "first_token" if isinstance(first, str) else "first_token_id"
        with _expressible(f"sampling.{field}", first):
            setattr(sampling, field, first)
    with _expressible("sampling.logit_bias", values.get("logit_bias")):
        sampling.logit_bias.update(values.get("logit_bias", {}))
    stop = values.get("stop", ())
    with _expressible("sampling.stop", stop):
        sampling.stop.extend([stop] if isinstance(stop, str) else stop)
    with _expressible("sampling.stop_token_ids", values.get("stop_token_ids")):
        sampling.stop_token_ids.extend(values.get("stop_token_ids", ()))
    _set_guide(sampling, {name: values[name] for name in _GUIDES if name in values})
    request = generation_pb2.GenerateRequest(sampling=sampling)
    for name in _REQUEST:
        if name in values:
            with _expressible(name, values[name]):
                setattr(request, name, values[name])
    _set_prompt(request, prompt, values.get("template_arguments"))
    return request


def is_messages(prompt: Prompt) -> TypeGuard[Messages]:
    """Returns whether a prompt is a conversation."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and isinstance(prompt[0], Mapping)
    )


def _set_prompt(
    request: generation_pb2.GenerateRequest, prompt: Prompt, template_arguments: Mapping[str, Any] | None
) -> None:
    if is_messages(prompt):
        for place, message in enumerate(prompt):
            request.chat.messages.append(_message(f"messages[{place}]", message))
        if template_arguments:
            with _expressible("template_arguments", template_arguments):
                request.chat.template_arguments = json.dumps(template_arguments)
        return
    if template_arguments:
        raise InvalidRequest("template_arguments", template_arguments, "left out, unless the prompt is messages")
    if isinstance(prompt, str):
        with _expressible("prompt.text", prompt):
            request.text = prompt
    else:
        request.token_ids.SetInParent()
        with _expressible("prompt.token_ids", prompt):
            request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]  # `is_messages` leaves them


def _message(field: str, message: Mapping[str, str]) -> generation_pb2.ChatMessage:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise InvalidRequest(field, message, "a mapping with role and content, and nothing else")
    made = generation_pb2.ChatMessage()
    for name, text in message.items():
        with _expressible(f"{field}.{name}", text):
            setattr(made, name, text)
    return made


def _set_guide(sampling: generation_pb2.SamplingParams, given: Mapping[str, Any]) -> None:
    if len(given) > 1:
        raise InvalidRequest("sampling.guide", " and ".join(given), "at most one of json_schema, regex and grammar")
    for name, value in given.items():
        with _expressible(f"sampling.guide.{name}", value):
            setattr(sampling.guide, name, value if isinstance(value, str) else json.dumps(value))


@contextmanager
def _expressible(field: str, value: object) -> Iterator[None]:
    """Raises InvalidRequest if the block cannot store `value` in a protobuf field. The gateway refuses other bad values."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, value, f"text in UTF-8: {not_utf8(error.object)}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(field, value, f"a value that generation.proto can express ({error})") from None
