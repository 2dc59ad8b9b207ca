"""One family of formats: how it marks reasoning and calls, put together to parsers and guides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moiety.core.sampling import Guide
from moiety.gateway.formats.forcing import Forcing, Shape, forced
from moiety.gateway.formats.pieces import NewId, OutputParser, call_id
from moiety.gateway.formats.stepping import Verbatim
from moiety.gateway.formats.thinking import EndParser, ThinkingParser
from moiety.gateway.formats.tool import Tool

THINK = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Family:
    """A format whose reasoning, if any, stands between two markers at the start of an output."""

    name: str
    calls: Callable[[NewId], OutputParser]  # returns a parser of what comes after reasoning
    shape: Shape
    thinking: tuple[tuple[str, str], ...] = (THINK,)
    ends: tuple[str, ...] = ()  # special tokens that end an output; dropped where they are decoded
    special_tokens: bool = False
    has_calls: bool = True

    def parser(self, *, tools: bool, reasoning_open: bool = False, new_id: NewId = call_id) -> OutputParser:
        """Returns a parser for one output; without `tools`, markers of calls are content."""
        inner = self.calls(new_id) if tools else Verbatim()
        parser = ThinkingParser(self.thinking, inner, opened=reasoning_open)
        return EndParser(self.ends, parser) if self.ends else parser

    def forced(self, tools: Sequence[Tool], name: str | None, how: Forcing | None = None) -> Guide:
        """Returns a guide whose every output is one or more calls of any tool, or one call of the tool `name`.

        Raises InvalidRequest if there are no tools, or none is called `name`.
        """
        return forced(self.shape, tools, name, how or Forcing())
