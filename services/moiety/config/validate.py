"""Makes settings from values, and reports a wrong one by name, value and bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moiety.config.bounds import bound_of
from moiety.config.registry_url import RegistryUrl, without_secrets
from moiety.errors import NOT_SHOWN, ConfigError

LISTED = "`moiety settings` lists all settings"
Settings = TypeVar("Settings", bound=BaseModel)


def validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Returns `kind(**values)`. Raises ConfigError for the first value that is refused."""
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
    place, why, value = first["loc"], first["type"], first["input"]
    name = ".".join(map(str, place))
    if why == "extra_forbidden":
        raise ConfigError(name, NOT_SHOWN, _unknown(kind, name))  # the value may be a secret under a misspelt name
    if why == "missing":  # its "input" is everything that was given
        raise ConfigError(name, NOT_SHOWN, "must be given")
    field = _declaration(kind, place)
    if field.annotation is RegistryUrl and not isinstance(value, str):
        value = NOT_SHOWN
    own = first["msg"].removeprefix("Value error, ") if why == "value_error" else f"must be {bound_of(field)}"
    raise ConfigError(name, _without_secrets(value), own)


def _declaration(kind: type[BaseModel], place: Sequence[int | str]) -> FieldInfo:
    """Returns the declaration of the setting at `place`, or of the innermost one that holds it."""
    field = kind.model_fields[str(place[0])]
    below = field.annotation
    if len(place) > 1 and get_origin(below) is Mapping:
        return FieldInfo.from_annotation(get_args(below)[1])
    inner = isinstance(below, type) and issubclass(below, BaseModel) and len(place) > 1
    return _declaration(below, place[1:]) if inner else field  # type: ignore[arg-type]


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
    may_be_url = isinstance(value, str) and ("://" in value or "@" in value)
    return without_secrets(value) if may_be_url else value


def similar(kind: type[BaseModel], name: str) -> list[str]:
    """Returns the dotted names of those settings of `kind` that may be meant by the unknown `name`."""
    names = list(dict.fromkeys([*(known for known, _ in leaves(kind)), *kind.model_fields]))
    return [known for known in names if known.rpartition(".")[2] == name] or get_close_matches(name, names, cutoff=0.7)


def _unknown(kind: type[BaseModel], name: str) -> str:
    """Says that `kind` has no setting called `name`, and which one may be meant."""
    meant = similar(kind, name)
    if name in meant:
        return f"unknown with a dot: write {': {'.join(name.split('.'))}: …{'}' * name.count('.')}"
    return f"unknown; did you mean {' or '.join(meant)}?" if meant else f"unknown; {LISTED}"
