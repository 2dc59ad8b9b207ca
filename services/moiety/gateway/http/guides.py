"""Reads what an output must match: response_format, structured_outputs and vLLM's older guided_* fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moiety.core.sampling import Guide, GuideKind
from moiety.errors import InvalidRequest
from moiety.gateway.http.schema.bodies import GenerationBody
from moiety.gateway.http.schema.fields import shown

_ANY_OBJECT = '{"type":"object"}'


def guide_of(body: GenerationBody) -> tuple[Guide, str] | None:
    """Returns the guide that a body asks for and the field that it comes from. Raises InvalidRequest for several.

    `structured_outputs` must name a guide, unless another field does: other keys of it are options of other servers.
    """
    found = [*_guides(body)]
    if len(found) > 1:
        names = " and ".join(name for _, name in found)
        raise InvalidRequest(found[1][1], f"beside {found[0][1]}", f"the only guide, but the request has {names}")
    if not found and body.structured_outputs is not None:  # a misspelt kind would leave the output free
        bound = "an object with one of json, json_object, regex, choice and grammar"
        raise InvalidRequest("structured_outputs", shown(body.structured_outputs), bound)
    return found[0] if found else None


def json_text(schema: object, field: str) -> str:
    """Returns a JSON schema as text. Raises InvalidRequest for anything but an object, a bool or such a text."""
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(field, shown(schema), "a JSON schema")
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise InvalidRequest(field, shown(schema), "a JSON schema of finite numbers") from None


def _guides(body: GenerationBody) -> Iterator[tuple[Guide, str]]:
    if (wanted := body.response_format) is not None and (guide := _response_format(wanted)) is not None:
        yield guide, "response_format"
    if (outputs := body.structured_outputs) is not None:
        for kind, value in outputs.items():
            name = f"structured_outputs.{kind}"
            if value is not None and value is not False and (guide := _structured(kind, value, name)) is not None:
                yield guide, name
    older = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
    }
    for kind, value in older.items():
        name = f"guided_{kind}"
        if value is not None and (guide := _structured(kind, value, name)) is not None:
            yield guide, name


def _response_format(wanted: dict[str, Any]) -> Guide | None:
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            return Guide(GuideKind.JSON_SCHEMA, _ANY_OBJECT)
        case "json_schema":
            named = wanted.get("json_schema")
            if not isinstance(named, dict) or named.get("schema") is None:
                raise InvalidRequest("response_format.json_schema", shown(named), "an object with a schema")
            return Guide(GuideKind.JSON_SCHEMA, json_text(named["schema"], "response_format.json_schema.schema"))
        case other:
            raise InvalidRequest("response_format.type", shown(other), "text, json_object or json_schema")


def _structured(kind: str, value: object, name: str) -> Guide | None:
    match kind:
        case "json":
            return Guide(GuideKind.JSON_SCHEMA, json_text(value, name))
        case "json_object":
            return Guide(GuideKind.JSON_SCHEMA, _ANY_OBJECT)
        case "regex":
            return Guide(GuideKind.REGEX, _text(value, name))
        case "grammar":
            return Guide(GuideKind.GRAMMAR, _text(value, name))
        case "choice":
            return Guide(GuideKind.GRAMMAR, _one_of(value, name))
        case "structural_tag":
            raise InvalidRequest(name, shown(value), "absent: it is not supported")
    return None  # options of other servers' compilers


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(name, shown(value), "a text")
    return value


def _one_of(choices: object, name: str) -> str:
    """Returns a Lark grammar of one of the texts `choices`."""
    if (
        not isinstance(choices, list | tuple)
        or not choices
        or not all(isinstance(each, str) and each for each in choices)
    ):
        raise InvalidRequest(name, shown(choices), "a list of texts, none of them empty")
    return "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choices)
