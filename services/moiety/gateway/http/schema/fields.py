"""Types of fields in JSON bodies. Bounds that the core checks are not repeated here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias, TypeGuard

from pydantic import BeforeValidator, PlainValidator, ValidationInfo, WithJsonSchema

from moiety.errors import InvalidRequest

MOST_PROMPTS = 64  # of one request
MOST_TOKEN_ID = (1 << 32) - 1  # what the protocol between services can carry
MOST_SHOWN = 100  # characters of a value in an error message
_INTEGER = (1 << 63) - 1  # larger integers have no meaning in any field

Prompt: TypeAlias = str | Sequence[int]  # text or token ids


def shown(value: object) -> object:
    """Returns what an error message shows of a client's value: containers may be huge, so only their kind and size."""
    if isinstance(value, str):
        return value[:MOST_SHOWN]
    if isinstance(value, Sequence):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    return value


def _integer(value: object) -> object:
    """Accepts 5.0 for 5, as JSON makes no difference between them."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _INTEGER:
        value = int(value)
    return value


def _strings(value: object, info: ValidationInfo) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise InvalidRequest(str(info.field_name), shown(value), "a string or a list of strings")


def _ids(value: object, info: ValidationInfo) -> tuple[int, ...]:
    if is_ids(value):
        return tuple(value)
    raise InvalidRequest(str(info.field_name), shown(value), "a list of token ids")


def is_ids(value: object) -> TypeGuard[list[int]]:
    """Returns whether `value` is a list of integers that can be token ids."""
    # At C's speed: a body may hold millions of ids, and the event loop waits.
    if not isinstance(value, list) or not {*map(type, value)} <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= MOST_TOKEN_ID)


def _biases(value: object, info: ValidationInfo) -> dict[int, float]:
    bound = "an object of numbers, whose keys are token ids"
    name = str(info.field_name)
    if not isinstance(value, dict):
        raise InvalidRequest(name, shown(value), bound)
    found: dict[int, float] = {}
    for key, bias in value.items():
        good = key.isascii() and key.isdigit() and len(key) <= 10 and type(bias) in (int, float)
        if not good or int(key) > MOST_TOKEN_ID:
            raise InvalidRequest(name, f"{key[:MOST_SHOWN]}: {shown(bias)}", bound)
        found[int(key)] = float(bias) if abs(bias) <= _INTEGER else float("inf")  # the core refuses it
    return found


def _prompts(value: object, info: ValidationInfo) -> tuple[Prompt, ...]:
    bound = f"a text, a list of token ids, or a list of 1 to {MOST_PROMPTS} of either"
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if is_ids(value):
            return (value,)
        if len(value) <= MOST_PROMPTS:
            if all(isinstance(each, str) for each in value):
                return tuple(value)
            if all(is_ids(each) for each in value):
                return tuple(value)
    raise InvalidRequest(str(info.field_name), shown(value), bound)


def _objects(value: object, info: ValidationInfo) -> list[dict[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return value
    raise InvalidRequest(str(info.field_name), shown(value), "a list of at least one object")


def _object(value: object, info: ValidationInfo) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise InvalidRequest(str(info.field_name), shown(value), "an object")


def _listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _ID = {"type": "string"}, {"type": "integer", "minimum": 0}

Integer = Annotated[int, BeforeValidator(_integer)]
Strings = Annotated[tuple[str, ...], PlainValidator(_strings), WithJsonSchema({"anyOf": [_TEXT, _listed(_TEXT)]})]
Ids = Annotated[tuple[int, ...], PlainValidator(_ids), WithJsonSchema(_listed(_ID))]
Biases = Annotated[
    dict[int, float],
    PlainValidator(_biases),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]
Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [_TEXT, _listed(_TEXT), _listed(_ID), _listed(_listed(_ID))]}),
]
Objects = Annotated[list[dict[str, Any]], PlainValidator(_objects), WithJsonSchema(_listed({"type": "object"}))]
Object = Annotated[dict[str, Any], PlainValidator(_object), WithJsonSchema({"type": "object"})]
Json = Annotated[Any, WithJsonSchema({})]  # any value
