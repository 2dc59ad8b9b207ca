"""A tool that a model may call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moiety.errors import InvalidRequest

NAME_CHARACTERS = "[A-Za-z0-9_.-]"
MAX_NAME = 128  # OpenAI's API accepts 64; names of tools from MCP servers are longer
TOOL_NAME = f"1 to {MAX_NAME} letters, digits, '_', '-' and '.'"
_NAME = re.compile(f"{NAME_CHARACTERS}{{1,{MAX_NAME}}}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function with its JSON Schema. Raises InvalidRequest for a name that no format could carry."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # the JSON Schema of the arguments; empty for a function without any

    def __post_init__(self) -> None:
        if not is_tool_name(self.name):
            raise InvalidRequest("tools.function.name", self.name, TOOL_NAME)


def is_tool_name(text: str) -> bool:
    """Returns whether a tool can have this name."""
    return _NAME.fullmatch(text) is not None
