"""The list of all settings, for people: generated from the models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ByteSize

from moiety.config.application import AppSettings
from moiety.config.registry_url import RegistryUrl
from moiety.config.resolve import variable_of
from moiety.config.validate import leaves


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of the application."""

    name: str  # dotted, such as router.slots
    default: str  # as YAML; empty for a setting that must be given
    description: str

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return variable_of(self.name)


def catalogue() -> Iterator[Setting]:
    """Yields every setting of the application, in the order of its declaration."""
    for name, field in leaves(AppSettings):
        default = "" if field.is_required() else as_yaml(field.get_default(call_default_factory=True))
        yield Setting(name, default, " ".join((field.description or "").split()))


def as_yaml(value: Any) -> str:
    """Returns a setting's value as one writes it in a YAML file or on a command line, without secrets."""
    if isinstance(value, ByteSize):
        return value.human_readable().replace(".0", "")
    return str(value) or '""' if isinstance(value, str | RegistryUrl) else json.dumps(value)
