"""Tools and tool_choice of chat requests, and the format in which the checkpoint's model writes calls.

The one place of this API that knows `moiety.gateway.formats`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moiety.core.sampling import Guide
from moiety.errors import ConfigError, InvalidRequest
from moiety.gateway.formats.format import FORMATS, Forcing, Format, Tool, format_for
from moiety.gateway.formats.pieces import CallArguments, CallBegins, Content, OutputParser, Piece, Reasoning
from moiety.gateway.formats.tool import TOOL_NAME, is_tool_name
from moiety.gateway.http.schema.fields import shown
from moiety.gateway.text.tokenizer import Tokenizer

__all__ = ["CallArguments", "CallBegins", "ChatFormat", "Content", "OutputParser", "Piece", "Reasoning", "ToolChoice"]

_THINKS = ("<think>", "[THINK]", "<|channel|>")  # markers of models that reason before they call
MOST_TOOLS = 256
_TAIL = 16  # tokens at the end of a prompt in which reasoning may be opened


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a request says about tools."""

    tools: tuple[Tool, ...] = ()
    declared: Sequence[Mapping[str, Any]] = ()  # as the client gave them, for the chat template
    forced: bool = False  # whether the output must be calls
    name: str | None = None  # of the only function that may be called
    parallel: bool = True


class ChatFormat:
    """How the model of one checkpoint writes reasoning and calls. Its format is None where neither is known."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, choice: str):
        """`choice`: auto, none, or the name of a format. Raises ConfigError for an unknown one."""
        self._tokenizer, self._template = tokenizer, template or ""
        if choice not in ("auto", "none", *FORMATS):
            raise ConfigError("gateway.tool_format", choice, f"must be auto, none or one of {', '.join(FORMATS)}")
        self.format: Format | None = FORMATS.get(choice)
        if choice == "auto" and template is not None:
            self.format = format_for(template, tokenizer.vocabulary)

    @property
    def keeps_special(self) -> bool:
        """Whether the format's markers are special tokens, which are then part of the text that is parsed."""
        return self.format is not None and self.format.special_tokens

    def parser(self, *, tools: bool, prompt_ids: Sequence[int]) -> OutputParser | None:
        """Returns a parser for one output after a prompt; None where all text is content."""
        if self.format is None:
            return None
        return self.format.parser(tools=tools, reasoning_open=self._reasons(prompt_ids))

    def guide(self, choice: ToolChoice, prompt_ids: Sequence[int]) -> Guide:
        """Returns the guide that forces calls. Raises InvalidRequest if the function named is not among the tools."""
        assert self.format is not None
        vocabulary = self._tokenizer.vocabulary
        how = Forcing(
            special=self._tokenizer.added_tokens,  # the model has learnt markers as these tokens, special or not
            parallel=choice.parallel,
            reasoning=any(marker in self._template or marker in vocabulary for marker in _THINKS),
            reasoning_open=self._reasons(prompt_ids),
        )
        return self.format.forced(choice.tools, choice.name, how)

    def choice_of(self, tools: Sequence[Any] | None, wanted: object, *, parallel: bool) -> ToolChoice:
        """Returns the checked `tools` and `tool_choice` of a request.

        Raises InvalidRequest for what is wrong, and for tools where the checkpoint's format is unknown.
        """
        forced, name = _wanted(wanted, bool(tools))
        if wanted == "none" or not tools:
            if forced:
                raise InvalidRequest("tool_choice", shown(wanted), "none or absent without tools")
            return ToolChoice()
        if len(tools) > MOST_TOOLS:
            raise InvalidRequest("tools", shown(tools), f"at most {MOST_TOOLS}")
        if self.format is None or not self.format.has_calls:
            bound = "absent: this checkpoint's format of tool calls is not known"
            raise InvalidRequest("tools", shown(tools), bound)
        known = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools))
        return ToolChoice(known, tools, forced, name, parallel)

    def _reasons(self, prompt_ids: Sequence[int]) -> bool:
        """Returns whether a prompt ends inside reasoning that it has opened."""
        return self._tokenizer.decode(prompt_ids[-_TAIL:], special=True).rstrip().endswith(("<think>", "[THINK]"))


def _wanted(choice: object, has_tools: bool) -> tuple[bool, str | None]:
    """Returns whether `tool_choice` forces a call, and the name of the function where it names one."""
    match choice:
        case None | "auto" | "none":
            return False, None
        case "required":
            return True, None
        case {"type": "function", "function": {"name": str(name)}}:
            return True, name
    bound = 'auto, none, required, or {"type": "function", "function": {"name": …}}'
    raise InvalidRequest("tool_choice", shown(choice), bound)


def _tool(given: Mapping[str, Any], place: str) -> Tool:
    function = given.get("function")
    if given.get("type", "function") != "function" or not isinstance(function, dict):
        raise InvalidRequest(place, shown(given), 'of type function, with an object "function"')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not is_tool_name(name):
        raise InvalidRequest(f"{place}.function.name", shown(name), TOOL_NAME)
    if not isinstance(parameters, dict | None):
        raise InvalidRequest(f"{place}.function.parameters", shown(parameters), "a JSON schema as an object")
    return Tool(name, str(function.get("description") or ""), parameters or {})
