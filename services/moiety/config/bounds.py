"""What a setting may be, in words, from its declaration: "a whole number from 1 to 4096"."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from moiety.config.registry_url import RegistryUrl


@dataclass(frozen=True, slots=True)
class Words:
    """Metadata of a setting: its bound in words, where the declaration says it in signs only, such as a pattern."""

    text: str


def bound_of(field: FieldInfo) -> str:
    """Returns what the value of a setting must be."""
    given = next((each.text for each in field.metadata if isinstance(each, Words)), None)
    return given or _of(field.annotation, field.metadata)


def _of(kind: Any, limits: list[Any]) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        inner, *_ = (each for each in get_args(kind) if each is not type(None))
        return f"{_of(inner, limits)}, or null"
    if get_origin(kind) is Literal:
        return _one_of(map(str, get_args(kind)))
    if isinstance(kind, type):
        if issubclass(kind, Enum):
            return _one_of(str(each.value) for each in kind)
        if issubclass(kind, ByteSize):
            least = "".join(f" of at least {ByteSize(low).human_readable()}" for low in _limits(limits, Ge, "ge"))
            return f"a number of bytes{least.replace('.0', '')}, such as 4GiB"
        if issubclass(kind, BaseModel):
            names = ", ".join(list(kind.model_fields)[:3])
            return f"a mapping of settings: {names}, …"
        if issubclass(kind, RegistryUrl):
            return "a URL such as redis://127.0.0.1:6379/0"
        for simple, words in ((bool, "true or false"), (int, "a whole number"), (float, "a number"), (str, "a text")):
            if issubclass(kind, simple):
                return words + _range(limits, " ")
    return "a mapping" if isinstance(get_origin(kind), type) and issubclass(get_origin(kind), Mapping) else "a value"


def _one_of(words: Any) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _range(limits: list[Any], before: str) -> str:
    """Returns the limits of a number in words, after `before`; nothing where there are none."""
    low = max(_limits(limits, Ge, "ge"), default=None)
    above = max(_limits(limits, Gt, "gt"), default=None)
    high = min(_limits(limits, Le, "le"), default=None)
    below = min(_limits(limits, Lt, "lt"), default=None)
    if low is not None and high is not None:
        return f"{before}from {_shown(low)} to {_shown(high)}"
    parts = [
        f"{word} {_shown(value)}"
        for word, value in (("of at least", low), ("above", above), ("of at most", high), ("below", below))
        if value is not None
    ]
    return before + " and ".join(parts) if parts else ""


def _limits(metadata: list[Any], kind: type[Any], name: str) -> list[Any]:
    """Returns the limits of one kind: a declaration may repeat one more strictly."""
    return [getattr(each, name) for each in metadata if isinstance(each, kind)]


def _shown(limit: Any) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"
