"""Renders the chart and finds objects in the result; no tests here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import yaml

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "helm" / "moiety"
# The values that a user must give.
MINIMAL: dict[str, Any] = {"image": {"repository": "registry.example.com/moiety"}, "model": {"existingClaim": "models"}}
# Values that switch on every optional object.
EVERYTHING: dict[str, Any] = {
    **MINIMAL,
    "redis": {"existingSecret": {"name": "redis-password"}},
    "telemetry": {"collector": {"enabled": True, "forwardTo": "https://tempo:4317"}},
    "networkPolicy": {"enabled": True, "clients": [{"namespaceSelector": {"matchLabels": {"team": "chat"}}}]},
}
Manifest = dict[str, Any]


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns `above` merged into `below` as Helm does: mappings key by key, everything else replaced."""
    out = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            out[key] = merged(below[key], above[key])
    return out


def nested(path: str, value: Any) -> dict[str, Any]:
    """Returns {"a": {"b": 1}} for `a.b` and 1."""
    key, _, rest = path.partition(".")
    return {key: nested(rest, value) if rest else value}


def templates(values: dict[str, Any], release: str = "rel") -> dict[str, str]:
    """Returns template path -> rendered text. Raises helm_python.HelmError if schema or templates refuse the values."""
    rendered: dict[str, str] = helm_python.Chart.load(CHART).render(values, name=release, namespace="ns")
    return rendered


def manifests(values: dict[str, Any], release: str = "rel") -> list[Manifest]:
    """Returns every rendered object, without NOTES.txt."""
    rendered = templates(values, release)
    texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def named(documents: list[Manifest], kind: str, suffix: str = "") -> Manifest | None:
    """Returns the first object of `kind` whose name ends in `suffix`, or None."""
    found = [doc for doc in documents if doc["kind"] == kind and doc["metadata"]["name"].endswith(suffix)]
    return found[0] if found else None


def dig(value: Any, path: str) -> Any:
    """Returns what is in `value` at a path such as `spec/ports/0`; None if there is nothing."""
    for key in path.split("/"):
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value


def leaves(value: Any, path: str = "") -> list[str]:
    """Returns the dotted paths of all values, those inside lists of mappings too; `resources` count as one value."""
    if isinstance(value, dict) and value and not path.endswith(".resources"):
        return [leaf for key, below in value.items() for leaf in leaves(below, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list) and value:
        return [leaf for item in value for leaf in leaves(item, path)]
    return [path]
