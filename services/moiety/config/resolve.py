"""Reads settings from flags, the environment and YAML files. No other module reads settings from environment or YAML.

Precedence: flag > MOIETY_* environment variable > YAML file > default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from moiety.errors import ConfigError

ENV_PREFIX = "MOIETY_"

Settings = TypeVar("Settings", bound=BaseModel)


def resolve(kind: type[Settings], flags: Mapping[str, Any], yaml_path: str | None = None) -> Settings:
    """Returns settings of `kind`. A flag (None = not given) overrides a MOIETY_* variable, which overrides the YAML file."""
    values: dict[str, Any] = {}
    if yaml_path is not None:
        values.update(_read_yaml(yaml_path))
    for name in kind.model_fields:
        if (text := os.environ.get(ENV_PREFIX + name.upper())) is not None:
            values[name] = text
    values.update({name: value for name, value in flags.items() if value is not None})
    return validated(kind, values)


def cache_dir() -> Path | None:
    """Returns the folder for derived files: $MOIETY_CACHE or ~/.cache/moiety; None if there is no home folder."""
    if text := os.environ.get(ENV_PREFIX + "CACHE"):
        return Path(text)
    try:
        return Path.home() / ".cache" / "moiety"
    except RuntimeError:
        return None


def validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Returns `kind(**values)`. Raises ConfigError for the first value that pydantic refuses."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # For a missing field, pydantic's input is everything that was given, which may hold a secret.
        value = None if first["type"] == "missing" else first["input"]
        raise ConfigError(".".join(map(str, first["loc"])), value, first["msg"].removeprefix("Value error, ")) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError("config file", path, f"cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError("config file", path, "must hold a mapping of settings")
    return data
