"""Checks a client's chat messages and brings them into the form that chat templates read, as transformers and vLLM do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moiety.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS: Mapping[str, str] = {"text": "text", "refusal": "refusal"}  # type of a part -> the field with its text


@dataclass(frozen=True, slots=True)
class ContentForms:
    """In which forms a template takes the content of a role's messages."""

    strings: bool = True
    parts: bool = False  # a list of {"type": "text", "text": …}


def template_messages(
    messages: Sequence[Mapping[str, Any]], template: str, forms: Callable[[str], ContentForms]
) -> list[dict[str, Any]]:
    """Returns `messages`, in OpenAI's form, as `template` reads them; changes nothing in place.

    Fields that are null are left out. Content in text parts stays a list where the template takes one (`forms`, by role),
    and becomes one text with a line per part elsewhere. The arguments of tool calls, JSON texts, become objects. The role
    `developer` becomes `system` where the template does not name it.

    Raises InvalidRequest that names the message's field.
    """
    if not messages:
        raise InvalidRequest("messages", [], "at least one message")
    return [_message(f"messages[{index}]", message, template, forms) for index, message in enumerate(messages)]


def names_role(template: str, role: str) -> bool:
    """Returns whether `template` holds `role` as a string."""
    return f"'{role}'" in template or f'"{role}"' in template


def _message(
    field: str, message: Mapping[str, Any], template: str, forms: Callable[[str], ContentForms]
) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(field, message, "an object")
    found = {str(key): value for key, value in message.items() if value is not None}
    role = found.get("role")
    if not isinstance(role, str) or not (role in ROLES or names_role(template, role)):
        raise InvalidRequest(
            f"{field}.role", role, f"one of {', '.join(ROLES)}, or a role that the chat template names"
        )
    if role == "developer" and not names_role(template, role):
        found["role"] = role = "system"
    if role == "assistant" and "tool_calls" in found:
        found["tool_calls"] = _tool_calls(f"{field}.tool_calls", found["tool_calls"])
        if not found["tool_calls"]:  # templates ask whether the field is there
            del found["tool_calls"]
    if "content" in found:
        found["content"] = _content(f"{field}.content", found["content"], forms(role))
    elif role != "assistant" or not {"tool_calls", "reasoning_content", "reasoning", "refusal"} & found.keys():
        raise InvalidRequest(f"{field}.content", None, "a text, or a list of text parts")
    return found


def _content(field: str, content: object, forms: ContentForms) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content if forms.strings or not forms.parts else [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise InvalidRequest(field, content, "a text, or a list of text parts")
    texts = [_part(f"{field}[{index}]", part) for index, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if forms.parts else "\n".join(texts)


def _part(field: str, part: object) -> str:
    """Returns the text of one part of a content."""
    if not isinstance(part, Mapping):
        raise InvalidRequest(field, part, "an object")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise InvalidRequest(
            f"{field}.type", kind, "text: Moiety serves language models, without images, audio or files"
        )
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise InvalidRequest(f"{field}.{TEXT_PARTS[kind]}", text, "a text")
    return text


def _tool_calls(field: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidRequest(field, calls, "a list of tool calls")
    return [_tool_call(f"{field}[{index}]", call) for index, call in enumerate(calls)]


def _tool_call(field: str, call: object) -> dict[str, Any]:
    """Returns a tool call whose arguments are an object, as templates expect it."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise InvalidRequest(field, call, "an object with a function")
    if not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{field}.function.name", function.get("name"), "a text")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{field}.function.arguments", arguments, f"JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise InvalidRequest(f"{field}.function.arguments", arguments, "a JSON object")
    return {**call, "function": {**function, "arguments": dict(arguments)}}
