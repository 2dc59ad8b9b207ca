"""The format of Hermes 2 Pro and 3, and of Qwen2.5 and Qwen3: `<tool_call>` around a JSON object.

    Let me look.
    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Sources: the model card of NousResearch/Hermes-2-Pro-Llama-3-8B, "Prompt Format for Function Calling"; Qwen's documentation,
"Function Calling" (qwen.readthedocs.io). Qwen3-Coder's calls in XML are another format.
"""

from __future__ import annotations

from moiety.gateway.formats.family import THINK, Family
from moiety.gateway.formats.forcing import ARGUMENTS, NAME, Shape
from moiety.gateway.formats.pieces import Content, NewId
from moiety.gateway.formats.stepping import CallsParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesCalls(CallsParser):
    """Finds calls in the text after reasoning.

    An object that breaks off before its name and arguments are known is content, together with its marker. One that
    breaks off later leaves the arguments as far as they go. Brackets too many after an object, which Qwen2.5
    writes now and then, are dropped. A missing `</tool_call>` is no error.
    """

    def __init__(self, new_id: NewId):
        super().__init__(new_id)
        self._step = self._content

    def step(self) -> bool:
        """Takes content, a call, or what is between two calls."""
        return self._step()

    def _content(self) -> bool:
        text, space, marker = self.until(OPEN, *([CLOSE] if self.calls else []))
        self.emit(Content(text))
        if marker == OPEN:
            self.opening = space + OPEN
            self.new_object()
            self._step = self._call
        elif marker == CLOSE:  # of a call that was given up
            self._step = self._between
        return marker is not None

    def _call(self) -> bool:
        is_call = self.take_object()
        if is_call is not None:
            self._step = self._close if is_call else self._content
        return is_call is not None

    def _close(self) -> bool:
        self.text = self.text.lstrip(" \t\r\n}]")
        marker = self.at(CLOSE)
        if marker == "":
            return False
        self.take(len(marker or ""))
        self._step = self._between
        return True

    def _between(self) -> bool:
        if self.skip_space():
            self._step = self._content
        return bool(self.text)


HERMES = Family(
    name="hermes",
    calls=HermesCalls,
    shape=Shape(
        call=(OPEN, '\n{"name": "', NAME, '", "arguments": ', ARGUMENTS, "}\n", CLOSE),
        between=("\n",),
        opening=(THINK[0],),
        closing=THINK[1],
        closed=("\n\n",),
    ),
)
