"""Builds guides whose outputs are tool calls, from a description of how a format writes them.

A guide is a grammar in llguidance's Lark dialect. A marker that the tokenizer has as a special token becomes that token,
by its id; any other marker becomes text. The arguments of each call follow the JSON Schema of their tool.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from moiety.core.sampling import Guide, GuideKind
from moiety.errors import InvalidRequest
from moiety.gateway.formats.tool import Tool

NAME, ARGUMENTS = "\0name", "\0arguments"  # places in `Shape.call`
_PROSE = ("description", "title", "$comment")
_VALUES = ("const", "enum", "default", "examples")  # what they hold is no schema
# White space between parts of JSON is bounded, as a model may otherwise fill all of max_tokens with it.
_SPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}"}


@dataclass(frozen=True, slots=True)
class Forcing:
    """How calls are forced on one output."""

    special: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # the tokenizer's special tokens
    parallel: bool = True  # whether the output may have several calls; with a named tool it has one
    reasoning: bool = False  # whether the output may begin with reasoning
    reasoning_open: bool = False  # whether the prompt ended inside reasoning, which the output then ends


@dataclass(frozen=True, slots=True)
class Shape:
    """How a format writes calls: literal text, in which each marker is an item of its own."""

    call: tuple[str, ...]  # one call, with NAME and ARGUMENTS in their places
    before: tuple[str, ...] = ()
    between: tuple[str, ...] | None = ()  # None: the format has one call in an output
    after: tuple[str, ...] = ()
    opening: tuple[str, ...] = ()  # before reasoning; empty if the format has none
    closing: str = ""  # the marker after reasoning
    closed: tuple[str, ...] = ()  # between reasoning and calls


def forced(shape: Shape, tools: Sequence[Tool], name: str | None, how: Forcing) -> Guide:
    """Returns a guide whose every output is one or more calls of any of `tools`, or one call of the tool `name`.

    Raises InvalidRequest if there are no tools, or none is called `name`.
    """
    if not tools:
        raise InvalidRequest("tools", [], "at least one tool")
    allowed = [tool for tool in tools if name in (None, tool.name)]
    if not allowed:
        raise InvalidRequest("tool_choice", name, f"one of {', '.join(tool.name for tool in tools)}")
    several = how.parallel and name is None and shape.between is not None
    more = _items(shape.between or (), how.special)
    start = [
        *_reasoning(shape, how),
        *_items(shape.before, how.special),
        "call",
        *([f"({' '.join([*more, 'call'])})*"] if several else []),
        *_items(shape.after, how.special),
    ]
    rules = [f"start: {' '.join(start)}", f"call: {' | '.join(f'call_{index}' for index in range(len(allowed)))}"]
    rules += [f"call_{index}: {' '.join(_items(shape.call, how.special, tool))}" for index, tool in enumerate(allowed)]
    if shape.closing:
        rules.append(_thought(shape.closing, how.special))
    return Guide(GuideKind.GRAMMAR, "\n".join(rules) + "\n")


def _reasoning(shape: Shape, how: Forcing) -> list[str]:
    if not shape.closing or not (how.reasoning or how.reasoning_open):
        return []
    rest = ["thought", *_items(shape.closed, how.special)]
    if how.reasoning_open:
        return rest
    return [f"({' '.join([*_items(shape.opening, how.special), *rest])})?"]


def _thought(closing: str, special: Mapping[str, int]) -> str:
    """Returns the rule of a text that ends with the marker `closing`."""
    if closing in special:
        return f"thought: /(?s:.*)/ <[{special[closing]}]>"
    return f"thought[lazy]: /(?s:.*){re.escape(closing).replace('/', chr(92) + '/')}/"


def _items(items: Sequence[str], special: Mapping[str, int], tool: Tool | None = None) -> list[str]:
    """Returns the items in Lark's syntax, neighbouring text as one."""
    result: list[str] = []
    text = ""
    for item in items:
        if tool and item == NAME:
            text += tool.name
        elif item not in special and item != ARGUMENTS:
            text += item
        else:
            result += _literal(text)
            text = ""
            result.append(f"<[{special[item]}]>" if item in special else f"%json {_schema(tool)}")
    return result + _literal(text)


def _literal(text: str) -> list[str]:
    return [json.dumps(text, ensure_ascii=False)] if text else []


def _schema(tool: Tool | None) -> str:
    assert tool is not None
    schema = {"type": "object", **tool.parameters} if tool.parameters else {"type": "object", "maxProperties": 0}
    return json.dumps({**_without_prose(schema), "x-guidance": _SPACE})


def _without_prose(schema: Any) -> Any:
    """Returns a JSON Schema without descriptions, which are most of a tool's text and constrain nothing.

    A property may be called `description`, but what describes it is no string.
    """
    if isinstance(schema, list):
        return [_without_prose(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: value if key in _VALUES else _without_prose(value)
        for key, value in schema.items()
        if not (key in _PROSE and isinstance(value, str))
    }
