"""DeepSeek's formats: special tokens around all calls, around each one, and between its name and arguments.

V3 and R1 write a type, the name, and the arguments as a block of code; V3.1 writes the name and the arguments:

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
    ```json
    {"city": "Paris"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>

One parser reads both; guides differ. Sources: the chat templates of deepseek-ai/DeepSeek-V3-0324 and DeepSeek-R1-0528; the
model card of deepseek-ai/DeepSeek-V3.1, "ToolCall". The format of V3.2 is another one.
"""

from __future__ import annotations

import re

from moiety.gateway.formats.call_object import JsonEnd
from moiety.gateway.formats.family import THINK, Family
from moiety.gateway.formats.forcing import ARGUMENTS, NAME, Shape
from moiety.gateway.formats.pieces import Content, NewId
from moiety.gateway.formats.stepping import CallsParser
from moiety.gateway.formats.tool import MAX_NAME, NAME_CHARACTERS

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_NAME = rf"({NAME_CHARACTERS}{{1,{MAX_NAME}}})"
_TYPED = re.compile(rf"\s*function\s*{re.escape(SEPARATOR)}\s*{_NAME}\s*(?:```(?:json)?)?\s*(?=\{{)")
_NAMED = re.compile(rf"\s*{_NAME}\s*{re.escape(SEPARATOR)}\s*(?=\{{)")
_MAX_HEAD = 4 * MAX_NAME  # characters of a head; it is held back until it is complete
_ENDS = (CALL_END, CALLS_END, CALL_BEGIN, CALLS_BEGIN)


class DeepSeekCalls(CallsParser):
    """Finds calls in the text after reasoning. The markers are special tokens, so none can be part of arguments.

    A call that has no name or no `{` before its end is content, with its marker. Arguments that break off are passed on as
    far as they go. Missing markers around all calls are no error.
    """

    def __init__(self, new_id: NewId):
        super().__init__(new_id)
        self._step = self._content
        self._arguments: JsonEnd | None = None  # None: they have ended

    def step(self) -> bool:
        """Takes content, the head of a call, its arguments, or what is between two calls."""
        return self._step()

    def _content(self) -> bool:
        text, space, marker = self.until(*_ENDS)
        self.emit(Content(text))
        if marker == CALL_BEGIN:
            self.opening = space + marker
            self._step = self._head
        elif marker:
            self._step = self._between
        return marker is not None

    def _between(self) -> bool:
        if self.skip_space():
            self._step = self._content
        return bool(self.text)

    def _head(self) -> bool:
        """Takes all before the arguments, which a bracket begins."""
        begun = [at for marker in ("{", *_ENDS) if (at := self.text.find(marker, 0, _MAX_HEAD + len(marker))) >= 0]
        end = min(begun, default=len(self.text))
        if not begun and end < _MAX_HEAD and not self.last:
            return False
        head = (_TYPED.match(self.text) or _NAMED.match(self.text)) if end < _MAX_HEAD else None
        if head and head.end() == end:
            self.take(end)
            self.begin(head[1])
            self._arguments = JsonEnd()
            self._step = self._call
        else:
            self.give_up()
            self._step = self._content
        return True

    def _call(self) -> bool:
        """Takes arguments, and drops what comes between them and the end of the call."""
        text, space, marker = self.until(*_ENDS)
        if self._arguments:
            text += space
            end = self._arguments.feed(text)
            self.arguments(text[:end])
            self._arguments = None if end is not None else self._arguments
        if marker == CALL_BEGIN:
            self.opening = marker
            self._step = self._head
        elif marker:
            self._step = self._between
        return marker is not None


_END_OF_SENTENCE = ("<｜end▁of▁sentence｜>",)
DEEPSEEK = Family(
    name="deepseek",
    calls=DeepSeekCalls,
    shape=Shape(
        before=(CALLS_BEGIN,),
        call=(CALL_BEGIN, "function", SEPARATOR, NAME, "\n```json\n", ARGUMENTS, "\n```", CALL_END),
        between=("\n",),
        after=(CALLS_END,),
        opening=(THINK[0], "\n"),
        closing=THINK[1],
        closed=("\n\n",),
    ),
    ends=_END_OF_SENTENCE,
    special_tokens=True,
)
DEEPSEEK_V31 = Family(
    name="deepseek_v31",
    calls=DeepSeekCalls,
    shape=Shape(
        before=(CALLS_BEGIN,),
        call=(CALL_BEGIN, NAME, SEPARATOR, ARGUMENTS, CALL_END),
        after=(CALLS_END,),
        opening=(THINK[0],),
        closing=THINK[1],
    ),
    ends=_END_OF_SENTENCE,
    special_tokens=True,
)
