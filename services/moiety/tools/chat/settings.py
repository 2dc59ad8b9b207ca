"""The options of sampling that /set shows and changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moiety.errors import InvalidRequest

Parse = Callable[[str], Any]  # raises ValueError that says what the value must be


class ChatSettings:
    """The current options by name. One without a value is left to the gateway."""

    def __init__(self, values: Mapping[str, Any], parsers: Mapping[str, Parse]):
        """`values` are the first ones; `parsers` has every name that `set` takes."""
        self._parsers = parsers
        self.values = {name: value for name, value in values.items() if value not in (None, (), {})}

    @property
    def names(self) -> list[str]:
        """What can be set."""
        return list(self._parsers)

    def set(self, name: str, text: str) -> None:
        """Changes an option; an empty text takes its value away. Raises InvalidRequest for a wrong name or value."""
        name = name.replace("-", "_")
        if name not in self._parsers:
            raise InvalidRequest("/set", name, f"one of {', '.join(self._parsers)}")
        if not text:
            self.values.pop(name, None)
            return
        try:
            self.values[name] = self._parsers[name](text)
        except ValueError as error:
            raise InvalidRequest(name, text, str(error)) from None

    def __str__(self) -> str:
        shown = (f"{name} {self.values[name]}" for name in self._parsers if name in self.values)
        return ", ".join(shown) or "all as the model's publisher recommends"
