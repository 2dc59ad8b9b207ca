"""The harmony format of gpt-oss: messages with headers, each in a channel.

    <|channel|>analysis<|message|>I need the weather.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather
    <|constrain|>json<|message|>{"city": "Paris"}<|call|>

(Without the line break.) The prompt ends with `<|start|>assistant`. The channel `analysis` is reasoning; `final`, and preambles
in `commentary`, are content; a message to `functions.…` is a call. Its recipient may stand before or after the channel.
Source: OpenAI's "OpenAI harmony response format" (developers.openai.com/cookbook, and docs/format.md of openai/harmony).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from moiety.core.sampling import Guide
from moiety.gateway.formats.forcing import ARGUMENTS, NAME, Forcing, Shape, forced
from moiety.gateway.formats.pieces import CallArguments, Content, NewId, OutputParser, Piece, Reasoning, call_id
from moiety.gateway.formats.stepping import CallsParser
from moiety.gateway.formats.tool import Tool, is_tool_name

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_FUNCTIONS = "functions."
_MAX_HEADER = 1024  # characters; a header is held back until it is complete
_TO = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_SHAPE = Shape(
    call=(CHANNEL, "commentary to=functions.", NAME, " ", CONSTRAIN, "json", MESSAGE, ARGUMENTS),
    between=None,  # `<|call|>` ends the output
    opening=(CHANNEL, "analysis", MESSAGE),
    closing=END,
    closed=(START, "assistant"),
)


class HarmonyParser(CallsParser):
    """Splits messages by their headers.

    Messages to tools that are built into the model (`python`, `browser.…`) count as reasoning. The arguments of a call are
    the text of its message, whatever it is; an empty one means `{}`. A header that breaks off is dropped, and
    text where a header should be is content.
    """

    def __init__(self, new_id: NewId, *, tools: bool, reasoning_open: bool):
        super().__init__(new_id)
        self._tools = tools
        self._takes: Callable[[str], None] = self._reason if reasoning_open else self._answer
        self._step = self._body if reasoning_open else self._begins
        self._empty_call = False  # whether a call has begun that has no arguments so far

    def step(self) -> bool:
        """Takes a header, or the text of a message."""
        return self._step()

    def finish(self) -> list[Piece]:
        """Returns `{}` for a call without arguments."""
        return [CallArguments(self.calls - 1, "{}")] if self._empty_call else []

    def _begins(self) -> bool:
        marker = self.at(START, CHANNEL, MESSAGE, " to=", "to=")
        if marker == "":
            return False
        self._takes = self._answer
        self._step = self._header if marker else self._body
        return True

    def _between(self) -> bool:
        if self.skip_space():
            self._step = self._begins
        return bool(self.text)

    def _header(self) -> bool:
        """Takes all up to the text of a message."""
        head = self.text[: _MAX_HEADER + len(MESSAGE)]
        found = [(at, marker) for marker in (MESSAGE, END, CALL, RETURN) if (at := head.find(marker)) >= 0]
        end, marker = min(found, default=(len(self.text), None))
        if marker is None and end < _MAX_HEADER and not self.last:
            return False
        self._takes, self._step = self._answer, self._body
        if end >= _MAX_HEADER:
            self.emit(Content(self.take(1)))  # so that the text no longer begins with a header
        else:
            header = self.take(end)
            if marker == MESSAGE:
                self.take(len(marker))
                self._open(header)
        return True

    def _open(self, header: str) -> None:
        """Decides what the text of a message is."""
        recipient, channel = _TO.search(header), _CHANNEL.search(header)
        to = recipient[1] if recipient else ""
        name = to.removeprefix(_FUNCTIONS)
        if to.startswith(_FUNCTIONS):
            if self._tools and is_tool_name(name):
                self.begin(name)
                self._takes, self._empty_call = self._argue, True
        elif to or (channel and channel[1] == "analysis"):
            self._takes = self._reason

    def _body(self) -> bool:
        text, space, marker = self.until(END, CALL, RETURN, START, CHANNEL)
        if text or space:
            self._takes(text + space)
        if marker:
            self.emit(*self.finish())
            self._empty_call = False
            self._step = self._between
            if marker in (START, CHANNEL):  # the end of the message is missing
                self.text = marker + self.text
        return marker is not None

    def _answer(self, text: str) -> None:
        self.emit(Content(text))

    def _reason(self, text: str) -> None:
        self.emit(Reasoning(text))

    def _argue(self, text: str) -> None:
        self._empty_call = False
        self.arguments(text)


class Harmony:
    """The format of gpt-oss."""

    name = "gpt_oss"
    special_tokens = True
    has_calls = True

    def parser(self, *, tools: bool, reasoning_open: bool = False, new_id: NewId = call_id) -> OutputParser:
        """Returns a parser for one output; without `tools`, messages to functions are content."""
        return HarmonyParser(new_id, tools=tools, reasoning_open=reasoning_open)

    def forced(self, tools: Sequence[Tool], name: str | None, how: Forcing | None = None) -> Guide:
        """Returns a guide whose every output is one call of any tool, or of the tool `name`.

        Raises InvalidRequest if there are no tools, or none is called `name`.
        """
        return forced(_SHAPE, tools, name, how or Forcing())


GPT_OSS = Harmony()
