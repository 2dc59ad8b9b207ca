"""Makes settings from values, and reports a wrong one by name, value and bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moiety.config.bounds import bound_of
from moiety.config.registry_url import without_secrets
from moiety.core.text import similar
from moiety.errors import NOT_SHOWN, ConfigError

LISTED = "`moiety settings` lists all settings"
Settings = TypeVar("Settings", bound=BaseModel)


def validated(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Returns `values` as a `kind`. Raises ConfigError for the first value that is refused."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
    place, why, value = first["loc"], first["type"], first["input"]
    name = ".".join(str(part) for part in place if part != "[key]")  # pydantic's mark of a mapping's key
    if why == "extra_forbidden":  # the value may be a secret under a misspelt name
        raise ConfigError(name, NOT_SHOWN, _unknown(kind, name, value))
    if why == "missing":  # its "input" is everything that was given
        raise ConfigError(name, NOT_SHOWN, "must be given")
    if why == "invalid_key" or place[-1] == "[key]":
        raise ConfigError(name, NOT_SHOWN, "the name of a setting must be a text: put a number in quotes")
    bound = f"must be {bound_of(_declaration(kind, place))}"
    if isinstance(value, Mapping | list | tuple):  # may be large, hold itself, or a secret under a misspelt name
        bound += f", not a {'mapping' if isinstance(value, Mapping) else 'list'}"
        value = NOT_SHOWN
    if why == "value_error":
        bound = first["msg"].removeprefix("Value error, ")
    raise ConfigError(name, _without_secrets(value), bound)


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
    """Returns `value`, or of a URL what may be shown: a password may stand under a misspelt name."""
    return without_secrets(value) if isinstance(value, str) and ("://" in value or "@" in value) else value


def meant_by(kind: type[BaseModel], name: str) -> list[str]:
    """Returns the dotted names of those settings of `kind` that may be meant by the unknown `name`."""
    names = list(dict.fromkeys([*(known for known, _ in leaves(kind)), *kind.model_fields]))
    last = name.casefold()
    return [known for known in names if known.rpartition(".")[2] == last] or similar(name, names)


def _unknown(kind: type[BaseModel], name: str, value: Any) -> str:
    """Says that `kind` has no setting called `name`, and which one may be meant."""
    meant = meant_by(kind, name)
    if name in meant:
        return f"unknown with a dot: write {': {'.join(name.split('.'))}: …{'}' * name.count('.')}"
    if isinstance(value, Mapping) and len(value) == 1:  # ROUTER.SLOTS, or {gatway: {port: 1}}
        meant = meant_by(kind, f"{name}.{next(iter(value))}") or meant
    return f"unknown; did you mean {' or '.join(meant)}?" if meant else f"unknown; {LISTED}"
