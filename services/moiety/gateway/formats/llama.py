"""The format of Llama 3.1 and 3.2: the whole output is a JSON object with a name and parameters.

    {"name": "get_weather", "parameters": {"city": "Paris"}}
    <|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}

`;` separates several objects, which Llama 3.1 was not trained to write. Source: llama.com's "Model Cards and
Prompt Formats" of Llama 3.1, "JSON based tool calling", and of Llama 3.2.
"""

from __future__ import annotations

from moiety.gateway.formats.family import Family
from moiety.gateway.formats.forcing import ARGUMENTS, NAME, Shape
from moiety.gateway.formats.pieces import Content, NewId
from moiety.gateway.formats.stepping import CallsParser

PYTHON_TAG = "<|python_tag|>"


class LlamaCalls(CallsParser):
    """Finds calls at the start of an output, or after `<|python_tag|>`.

    An object is a call if it has a name and parameters, which may also be called arguments, and no other member before
    them but a type or an id. Any other object is content, such as JSON that the user asked for. So is code after the
    tag. Parameters that break off are passed on as far as they go.
    """

    def __init__(self, new_id: NewId, tag: str = PYTHON_TAG, end: str | None = None):
        """`tag` and `end`: special tokens that may stand before and after calls."""
        super().__init__(new_id)
        self._tag, self._ends = tag, () if end is None else (end,)
        self._step = self._start

    def step(self) -> bool:
        """Takes content, a call, or what is between two calls."""
        return self._step()

    def _start(self) -> bool:
        """Takes what may come before an object."""
        self.opening += self.take_space()
        if not self.text:
            return False
        if self.text[0] == "{":
            self.new_object(certain=False)
            self._step = self._call
            return True
        marker = self.at(self._tag)
        if marker == "":
            return False
        if marker:
            self.take(len(marker))
        else:
            self.give_up()
            self._step = self._content
        return True

    def _content(self) -> bool:
        text, space, marker = self.until(self._tag)
        self.emit(Content(text))
        if marker:
            self.opening = space
            self._step = self._start
        return marker is not None

    def _call(self) -> bool:
        is_call = self.take_object()
        if is_call is not None:
            self._step = self._between if is_call else self._content
        return is_call is not None

    def _between(self) -> bool:
        if not self.skip_space():
            return False
        if self.text[0] == ";":
            self.opening = self.take(1)
            self._step = self._start
            return True
        marker = self.at(*self._ends)
        if marker == "":
            return False
        if marker:
            self.take(len(marker))
        else:
            self._step = self._content
        return True


LLAMA = Family(
    name="llama",
    calls=LlamaCalls,
    shape=Shape(call=('{"name": "', NAME, '", "parameters": ', ARGUMENTS, "}"), between=None),
    ends=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    special_tokens=True,
)
