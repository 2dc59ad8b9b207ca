"""The OpenAPI document as one HTML page, which loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-size:.95em}table{border-collapse:collapse;width:100%}"
    "td{border-top:1px solid #ccc;padding:.3rem .6rem;vertical-align:top}h2{margin-top:2.5rem}"
)


def page(document: Mapping[str, Any]) -> str:
    """Returns the page of an OpenAPI document."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>',
        f"<body><h1>{title}</h1><p>{_text(info['description'])} ",
        'The same as <a href="/openapi.json">OpenAPI</a>.</p>',
    ]
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            parts += [f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{_text(described['summary'])}</p>"]
            if (body := described.get("requestBody")) is not None:
                schema = body["content"]["application/json"]["schema"]
                parts += ["<table>", *_rows(_resolved(document, schema)), "</table>"]
    return "".join([*parts, "</body></html>"])


def _rows(schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        must = " (required)" if name in required else ""
        about = _text(field.get("description", ""))
        yield f"<tr><td><code>{escape(name)}</code>{must}</td><td>{escape(_kind(field))}</td><td>{about}</td></tr>"


def _kind(schema: Mapping[str, Any]) -> str:
    """Returns the types that a schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if "$ref" in schema:
        return "object"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("type", "any value"))


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema["$ref"].rpartition("/")[2]
    found: Mapping[str, Any] = document["components"]["schemas"][name]
    return found


def _text(about: str) -> str:
    return escape(about).replace("\n", " ")
