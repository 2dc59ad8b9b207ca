"""Reads the application's settings, once, at the entry of a command or of the Serve application.

Precedence: flag or argument > MOIETY_* environment variable > file of MOIETY_SECRETS_DIR > YAML file > default. What runs
below the entry receives plain frozen settings. No other module reads settings from environment or files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, EnvSettingsSource, SecretsSettingsSource, SettingsConfigDict, SettingsError

from moiety.config.application import AppSettings
from moiety.config.validate import leaves, meant_by, validated
from moiety.config.yaml_text import NotRead, from_yaml
from moiety.errors import NOT_SHOWN, ConfigError

ENV_PREFIX = "MOIETY_"
NESTED = "__"  # MOIETY_ROUTER__SLOTS is router.slots
SECRETS_DIR = "MOIETY_SECRETS_DIR"

_log = logging.getLogger(__name__)


class _Sources(AppSettings, BaseSettings):
    """What pydantic-settings looks for; never made itself."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter=NESTED, env_parse_none_str="null", env_ignore_empty=True
    )


def resolve(given: Mapping[str, Any], yaml_path: str | None = None) -> AppSettings:
    """Returns the settings. What is `given` (flags, or Serve's arguments) wins over all other sources, field by field."""
    file = {} if yaml_path is None else _read_yaml(yaml_path)
    surroundings = from_surroundings()
    _warn_of_unread_variables(surroundings)
    try:
        return validated(AppSettings, merged(file, surroundings, given))
    except ConfigError as error:
        if _has(given, error.field):
            raise
        source = _source(error.field) if _has(surroundings, error.field) else yaml_path
        if source is None or not _has(merged(file, surroundings), error.field):
            raise  # a default that another setting contradicts, or a missing one
        raise ConfigError(error.field, error.value, f"{error.bound} (from {source})") from None


def from_surroundings() -> dict[str, Any]:
    """Returns what MOIETY_* variables and, below them, the files of the folder MOIETY_SECRETS_DIR set.

    A file has the name of a top-level setting, such as `registry`. A nested one is a variable such as
    MOIETY_ROUTER__SLOTS, or JSON in the variable or file of the outer one.
    """
    secrets: dict[str, Any] = {}
    try:
        if folder := os.environ.get(SECRETS_DIR):
            if not Path(folder).is_dir():
                raise ConfigError(SECRETS_DIR, folder, "must be a folder")
            files = SecretsSettingsSource(_Sources, folder, env_prefix="")() or {}
            secrets = {name: value for name, value in files.items() if value != ""}  # unset, like an empty variable
        return merged(secrets, EnvSettingsSource(_Sources)() or {})
    except SettingsError as error:
        name = str(error).split('"')[1]  # pydantic-settings names the outer setting and its own class
        source = _secret_file(name) if SecretsSettingsSource.__name__ in str(error) else _source(name)
        raise ConfigError(name, NOT_SHOWN, f"{source} must be JSON") from None
    except RecursionError:
        raise ConfigError(f"{ENV_PREFIX}*", NOT_SHOWN, "JSON of one of these variables nests too deep") from None


def _has(settings: Mapping[str, Any], name: str) -> bool:
    """Whether `settings` give the setting with this dotted name."""
    outer, _, inner = name.partition(".")
    below = settings.get(outer)
    return outer in settings and (not inner or name in settings or (isinstance(below, Mapping) and _has(below, inner)))


def _source(name: str) -> str:
    """Returns where the surroundings set `name`: its variable, those of what is inside it, that of an outer one, or a file."""
    variables, parts = {variable.upper() for variable in os.environ}, name.split(".")
    own, *outer = (variable_of(".".join(parts[:depth])) for depth in range(len(parts), 0, -1))
    inside = sorted(variable for variable in variables if variable.startswith(own + NESTED))
    found = [own] if own in variables else inside or [variable for variable in outer if variable in variables][:1]
    return " or ".join(found) or _secret_file(name)


def _secret_file(name: str) -> str:
    return f"the secret file {name.partition('.')[0]}"


def variable_of(name: str) -> str:
    """Returns the environment variable of the setting `name`: MOIETY_ROUTER__SLOTS for `router.slots`."""
    return ENV_PREFIX + name.replace(".", NESTED).upper()


def merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all of `sources` in one, later ones first, and mappings inside them key by key."""
    out: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            below = out.get(name)
            out[name] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def nested(name: str, value: Any) -> dict[str, Any]:
    """Returns {"router": {"slots": 64}} for `router.slots` and 64."""
    for part in reversed(name.split(".")):
        value = {part: value}
    out: dict[str, Any] = value
    return out


def _read_yaml(path: str) -> dict[str, Any]:
    field = "config file"
    try:
        data = from_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(field, path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(field, path, f"cannot be read: its byte {error.start + 1} is not UTF-8") from None
    except NotRead as error:
        raise ConfigError(field, path, f"cannot be read: {error}") from None
    if isinstance(data, dict) and "applications" in data:
        raise ConfigError(
            field,
            path,
            "is a configuration of Ray Serve: `serve deploy` deploys it. For `moiety serve`, write what stands under `args` "
            "of the application into a file of its own",
        )
    if not isinstance(data, dict):
        raise ConfigError(field, path, "must hold a mapping of settings by name, such as `groups: 4`")
    return data


def _warn_of_unread_variables(surroundings: Mapping[str, Any]) -> None:
    """Warns of a variable that sets nothing but resembles one that would. No error: Kubernetes sets some for a Service."""
    names = {name for name, _ in leaves(AppSettings)} | AppSettings.model_fields.keys()
    for variable, value in os.environ.items():
        if not variable.startswith(ENV_PREFIX) or value.startswith("tcp://"):
            continue
        name = variable.removeprefix(ENV_PREFIX).lower().replace(NESTED, ".")
        if name not in names and not _has(surroundings, name) and (meant := meant_by(AppSettings, name)):
            _log.warning("%s is not read; did you mean %s?", variable, " or ".join(map(variable_of, meant)))
