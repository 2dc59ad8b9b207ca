"""Writes the part of the chart that mirrors the application's settings: `app` in values.yaml and in values.schema.json.

`python tests/helm/app_settings.py` rewrites both files after a change of a setting; a test compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from rendering import CHART

from moiety.config.application import AppSettings
from moiety.config.catalogue import catalogue

ELSEWHERE = {"model", "registry"}  # these come from the keys `model` and `redis` of the chart
CHART_DEFAULTS = {"listen_host": "0.0.0.0"}  # other pods must reach the services
WIDTH = 128
HEAD = {
    "values.yaml": "app: # arguments of the Serve application, the same names as in `moiety settings`; a change restarts it",
    "values.schema.json": '    "app": {',
}


def values_of_app() -> str:
    """Returns the section `app` of values.yaml: every setting with its default and, as a comment, its description."""
    lines, section = [HEAD["values.yaml"]], ""
    for setting in catalogue():
        outer, _, name = setting.name.rpartition(".")
        if setting.name in ELSEWHERE:
            continue
        if outer != section and outer:
            lines.append(f"  {outer}: # {AppSettings.model_fields[outer].description}")
        section = outer
        indent = "    " if outer else "  "
        line = f"{indent}{name}: {CHART_DEFAULTS.get(setting.name, setting.default)}"
        comment = f"# {setting.description}"
        if len(f"{line} {comment}") <= WIDTH:
            lines.append(f"{line} {comment}")
        else:
            lines += [*wrap(comment, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}# "), line]
    return "\n".join(lines) + "\n\n"


def schema_of_app() -> str:
    """Returns the property `app` of values.schema.json: the names, types and bounds of the settings, and nothing else."""
    whole = AppSettings.model_json_schema()
    app = _plain(whole, whole["$defs"])
    for name in ELSEWHERE:
        del app["properties"][name]
    del app["required"]
    for port in ("port", "http_port"):
        app["properties"]["gateway"]["properties"][port]["minimum"] = 1  # a Service needs a fixed port
    entry = {"$ref": "#/properties/app/properties/experts"}
    app["properties"]["overrides"] = {
        "type": "object",
        "patternProperties": {
            "^experts-[0-9]+$": entry,
            "^hot-[0-9]+$": {"allOf": [entry, {"not": {"required": ["overflow"]}}]},
        },
        "additionalProperties": False,
    }
    return _object(app, HEAD["values.schema.json"], "    ") + ",\n"


def written(file: str, section: str) -> str:
    """Returns the text of the chart's `file` with `section` in the place of the one that starts with the same word."""
    text = (CHART / file).read_text()
    begins, ends = {"values.yaml": (r"app:", r"ray:"), "values.schema.json": (r'    "app":', r'    "ray":')}[file]
    return re.sub(rf"^{begins}.*?(?=^{ends})", lambda _: section, text, count=1, flags=re.DOTALL | re.MULTILINE)


SECTIONS = {"values.yaml": values_of_app, "values.schema.json": schema_of_app}


def _plain(node: Any, definitions: Mapping[str, Any]) -> Any:
    """Returns pydantic's schema without references, titles, descriptions and defaults."""
    if isinstance(node, list):
        return [_plain(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _plain(definitions[node["$ref"].rpartition("/")[2]], definitions)
    if "properties" in node:
        properties = {name: _plain(below, definitions) for name, below in node["properties"].items()}
        return {**_plain({k: v for k, v in node.items() if k != "properties"}, definitions), "properties": properties}
    dropped = ("title", "description", "default", "$defs")
    return {key: _plain(value, definitions) for key, value in node.items() if key not in dropped}


def _object(schema: Mapping[str, Any], head: str, indent: str) -> str:
    """Returns the schema of an object as JSON, one line per property."""
    lines = [
        head,
        f'{indent}  "type": "object",',
        f'{indent}  "additionalProperties": false,',
        f'{indent}  "properties": {{',
    ]
    properties = []
    for name, below in schema["properties"].items():
        if "properties" in below:
            properties.append(_object(below, f'{indent}    "{name}": {{', f"{indent}    "))
        else:
            properties.append(f'{indent}    "{name}": {json.dumps(below)}')
    return "\n".join([*lines, ",\n".join(properties), f"{indent}  }}", f"{indent}}}"])


if __name__ == "__main__":
    for file, section in SECTIONS.items():
        (CHART / file).write_text(written(file, section()))
