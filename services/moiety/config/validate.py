"""Makes settings from values, and reports a wrong one by name, value and bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moiety.config.registry_url import without_secrets
from moiety.errors import ConfigError

Settings = TypeVar("Settings", bound=BaseModel)


def validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Returns `kind(**values)`. Raises ConfigError for the first value that pydantic refuses."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        bound = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            bound = _unknown(kind, name)
        # For a missing field, pydantic's input is everything that was given, which may hold a secret.
        value = None if first["type"] == "missing" else first["input"]
        raise ConfigError(name, _without_secrets(value), bound) from None


def leaves(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields the dotted name of every setting of `kind`, those of nested models included, and its declaration."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _without_secrets(value: Any) -> Any:
    """Returns `value` with its URLs as they may be shown: a password may stand under a misspelt name."""
    if isinstance(value, Mapping):
        return {name: _without_secrets(below) for name, below in value.items()}
    if isinstance(value, list):
        return [_without_secrets(below) for below in value]
    return without_secrets(value) if isinstance(value, str) and "://" in value else value


def similar(kind: type[BaseModel], name: str) -> list[str]:
    """Returns the dotted names of those settings of `kind` that may be meant by the unknown `name`."""
    names = [known for known, _ in leaves(kind)]
    return [known for known in names if known.rpartition(".")[2] == name] or get_close_matches(name, names, cutoff=0.7)


def _unknown(kind: type[BaseModel], name: str) -> str:
    """Says that `kind` has no setting called `name`, and which one may be meant."""
    meant = similar(kind, name)
    if name in meant:
        return f"unknown with a dot: write {': {'.join(name.split('.'))}: …{'}' * name.count('.')}"
    return f"unknown; did you mean {' or '.join(meant)}?" if meant else "unknown"
