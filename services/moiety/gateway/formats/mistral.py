"""Mistral's formats: the special token `[TOOL_CALLS]`, then a JSON list, or a name and arguments for each call.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]       tokenizers v2 to v7
    [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}  tokenizers v11 and newer

v11 may write `[CALL_ID]` and an id before `[ARGS]`. One parser reads all of these; guides differ. Magistral reasons between
`[THINK]` and `[/THINK]`, and the first one between `<think>` and `</think>`.

Sources: Mistral's documentation of its tokenizers (docs.mistral.ai, "Tokenization") and mistral-common's
(mistralai.github.io/mistral-common, "Tool calling"); the model card of mistralai/Magistral-Small-2509.
"""

from __future__ import annotations

import re

from moiety.gateway.formats.call_object import JsonEnd
from moiety.gateway.formats.family import THINK, Family
from moiety.gateway.formats.forcing import ARGUMENTS, NAME, Shape
from moiety.gateway.formats.pieces import Content, NewId
from moiety.gateway.formats.stepping import CallsParser
from moiety.gateway.formats.tool import MAX_NAME, NAME_CHARACTERS

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_THINK = ("[THINK]", "[/THINK]")
# `\s*+` gives nothing back: with two plain `\s*`, n spaces that no bracket follows take n² steps.
_HEAD = re.compile(
    rf"({NAME_CHARACTERS}{{1,{MAX_NAME}}})(?:{re.escape(CALL_ID)}\w{{0,{MAX_NAME}}})?\s*+(?:{re.escape(ARGS)})?\s*+(?=\{{)"
)
# What `_HEAD` may still match with more text after it.
_MARKER_BEGUN = r"\[|\[A|\[AR|\[ARG|\[ARGS"
_ID_BEGUN = r"\[|\[C|\[CA|\[CAL|\[CALL|\[CALL_|\[CALL_I|\[CALL_ID"
_HEAD_BEGUN = re.compile(
    rf"{NAME_CHARACTERS}{{1,{MAX_NAME}}}(?:(?:{_ID_BEGUN})?|(?:{re.escape(CALL_ID)}\w{{0,{MAX_NAME}}})?\s*"
    rf"(?:{_MARKER_BEGUN}|{re.escape(ARGS)}\s*)?)"
)


class MistralCalls(CallsParser):
    """Finds calls in the text after reasoning.

    What is no call after the marker is content, together with the marker; arguments that break off are passed on as far
    as they go.
    """

    def __init__(self, new_id: NewId):
        super().__init__(new_id)
        self._step = self._content
        self._arguments = JsonEnd()
        self._listed = False  # whether calls are items of a JSON list

    def step(self) -> bool:
        """Takes content, the head of a call, its arguments, or what is between two calls."""
        return self._step()

    def _content(self) -> bool:
        text, space, marker = self.until(CALLS)
        self.emit(Content(text))
        if marker:
            self.opening, self._listed = space + marker, False
            self._step = self._head
        return marker is not None

    def _head(self) -> bool:
        """Takes what comes between the marker and the first bracket of an object."""
        self.opening += self.take_space()
        if not self.text:
            return False
        if self.text[0] == "[" and not self._listed:
            self.opening += self.take(1)
            self._listed = True
        elif self.text[0] == "{":
            self.new_object()
            self._step = self._call
        elif not self._listed and (head := _HEAD.match(self.text)):
            self.take(head.end())
            self.begin(head[1])
            self._arguments = JsonEnd()
            self._step = self._plain_arguments
        elif not self._listed and not self.last and _HEAD_BEGUN.fullmatch(self.text):
            return False
        else:
            self.give_up()
            self._step = self._content
        return True

    def _call(self) -> bool:
        is_call = self.take_object()
        if is_call is not None:
            self._step = self._between if is_call else self._content
        return is_call is not None

    def _plain_arguments(self) -> bool:
        end = self._arguments.feed(self.text)
        self.arguments(self.take(len(self.text) if end is None else end))
        if end is not None:
            self._step = self._between
        return end is not None

    def _between(self) -> bool:
        if not self.skip_space():
            return False
        if self._listed and self.text[0] == ",":
            self.opening = self.take(1)
            self._step = self._head
        elif self._listed and self.text[0] == "]":
            self.take(1)
            self._listed = False
        else:
            self._step = self._content
        return True


_ENDS = ("</s>",)
MISTRAL = Family(
    name="mistral",
    calls=MistralCalls,
    shape=Shape(
        before=(CALLS, "["),
        call=('{"name": "', NAME, '", "arguments": ', ARGUMENTS, "}"),
        between=(", ",),
        after=("]",),
        opening=(_THINK[0],),
        closing=_THINK[1],
    ),
    thinking=(_THINK, THINK),
    ends=_ENDS,
    special_tokens=True,
)
MISTRAL_ARGS = Family(
    name="mistral_args",
    calls=MistralCalls,
    shape=Shape(call=(CALLS, NAME, ARGS, ARGUMENTS), opening=(_THINK[0],), closing=_THINK[1]),
    thinking=(_THINK, THINK),
    ends=_ENDS,
    special_tokens=True,
)
