"""The format of a checkpoint whose calls are unknown: reasoning in `<think>`, if any, and an answer."""

from __future__ import annotations

from collections.abc import Sequence

from moiety.core.sampling import Guide
from moiety.errors import FailedPrecondition
from moiety.gateway.formats.family import THINK
from moiety.gateway.formats.forcing import Forcing
from moiety.gateway.formats.pieces import NewId, OutputParser, call_id
from moiety.gateway.formats.stepping import Verbatim
from moiety.gateway.formats.thinking import ThinkingParser
from moiety.gateway.formats.tool import Tool


class Plain:
    """Splits off reasoning; has no calls."""

    name = "plain"
    special_tokens = False
    has_calls = False

    def parser(self, *, tools: bool, reasoning_open: bool = False, new_id: NewId = call_id) -> OutputParser:
        """Returns a parser for one output, which finds no calls whatever `tools` is."""
        return ThinkingParser((THINK,), Verbatim(), opened=reasoning_open)

    def forced(self, tools: Sequence[Tool], name: str | None, how: Forcing | None = None) -> Guide:
        """Raises FailedPrecondition: no output would be a call."""
        raise FailedPrecondition("this checkpoint's format of tool calls is unknown: name one of them in the settings")


PLAIN = Plain()
