"""The OpenAPI document of the HTTP API, made from the types of its bodies."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

import moiety
from moiety.gateway.http.schema.bodies import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_ERRORS = {
    "400": "A field is wrong; `param` names it.",
    "404": "The model is not served here.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "A bounded queue is full; Retry-After and retry-after-ms say when to try again.",
    "500": "A fault of the server; its log has it under the request id.",
    "503": "No router is ready, or experts had no live replica for too long.",
}
_JSON_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_POSTS: dict[str, tuple[str, type[Body], str]] = {
    "/v1/completions": ("Continues prompts.", CompletionBody, "A text_completion; with `stream`, server-sent events."),
    "/v1/chat/completions": (
        "Answers a conversation.",
        ChatBody,
        "A chat.completion; with `stream`, server-sent events.",
    ),
    "/tokenize": ("Returns the tokens of a text or a conversation.", TokenizeBody, "count, max_model_len and tokens."),
    "/detokenize": ("Returns the text of tokens.", DetokenizeBody, "The text, as `prompt`."),
}
_GETS = {
    "/v1/models": "Lists the served models.",
    "/v1/models/{model}": "Describes a served model.",
    "/healthz": "Answers while the gateway lives.",
    "/readyz": "Answers with 200 while the gateway can serve requests, else with 503.",
    "/version": "Returns Moiety's version.",
}


def document() -> dict[str, Any]:
    """Returns the OpenAPI document."""
    bodies = [(body, "validation") for _, body, _ in _POSTS.values()]
    _, schemas = models_json_schema(bodies, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {path: {"get": _get(path, summary)} for path, summary in _GETS.items()}
    for path, (summary, body, answer) in _POSTS.items():
        paths[path] = {"post": _post(summary, body, answer)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Moiety",
            "version": moiety.__version__,
            "description": "OpenAI's HTTP API, with the fields that vLLM adds. Unknown fields are ignored.",
        },
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": _error()}},
    }


def _get(path: str, summary: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "OK", "content": _JSON_OBJECT}},
    }
    if "{model}" in path:
        described["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return described


def _post(summary: str, body: type[Body], answer: str) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses: dict[str, Any] = {"200": {"description": answer, "content": _JSON_OBJECT}}
    responses |= {status: {"description": why, "content": error} for status, why in _ERRORS.items()}
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": responses,
    }


def _error() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    error = {"type": "object", "properties": fields, "required": [*fields]}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
